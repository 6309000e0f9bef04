"""Every method in several gloo processes under DDP and FSDP2, against one process on the joined batch."""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import joined_branches
import joined_factors
import joined_folded
import joined_options
import pytest
import torch
from processes import (
    SHARDED_FLOAT32,
    alone,
    average,
    batch_of,
    build,
    check,
    ddp,
    grads,
    joined_batch,
    loss_of,
    sharded,
    values,
)
from torch import distributed as dist

from fngd import FNGD, NGD

STEPS = 5


def directions_are_averaged(rank: int, world: int) -> None:
    """DDP: the average of the ranks' own directions; uneven last batches, stored coefficients too."""
    sizes = [[4] * world, [3 + r for r in range(world)]]
    model = build()
    opt = FNGD(model, lr=0.05, steps_per_epoch=2, alpha=1e-2)
    wrapped = ddp(model)
    rows: dict[int, Any] = {}
    for step in range(4):
        state = values(model)
        opt.zero_grad()
        loss_of(wrapped, batch_of(step, rank, sizes[step % 2][rank])).backward()
        if step < 2:
            parts = [
                alone(state, batch_of(step, r, sizes[step][r]), lambda net: NGD(net, alpha=1e-2)) for r in range(world)
            ]
            check(grads(model), average(parts))
        rows[step] = grads(model)
        opt.step()
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, values(model))
        for other in everyone:
            assert all(torch.equal(other[name], value) for name, value in values(model).items())
    opt.remove()


def coefficients_by_sample_reach_every_process(rank: int, world: int) -> None:
    """In the second epoch each process has the samples of its neighbour; it resumes in the middle of the first."""
    options = {"lr": 0.0, "steps_per_epoch": 2, "alpha": 1e-2, "share": "sample", "samples": 8 * world}
    model = build()
    opt = FNGD(model, **options)
    wrapped = ddp(model)
    directions: list[Any] = []
    for step in range(4):
        whose = rank if step < 2 else (rank + 1) % world
        opt.zero_grad()
        opt.next_batch(torch.arange(4) + 4 * (2 * whose + step % 2))
        loss_of(wrapped, batch_of(step % 2, whose, 4)).backward()
        directions.append(grads(model))
        opt.step()
        if step == 0:
            state = opt.state_dict()
            opt.remove()
            opt = FNGD(model, **options)
            opt.load_state_dict(state)
    for computed, shared in zip(directions[:2], directions[2:], strict=True):
        check(shared, computed)
    assert "met" not in opt.state_dict()
    opt.remove()


def sharded_equals_replicated(rank: int, world: int) -> None:
    """FSDP2 = DDP, step for step, with momentum, decay and KL clip."""
    for options in ({"weight_decay": 1e-2}, {"kl_clip": 1e-4}, {"scale": "graft", "fisher": "improved"}):
        first, second = build(), build()
        one = FNGD(first, lr=0.05, steps_per_epoch=2, alpha=1e-2, **options)
        replicated = ddp(first)
        whole = sharded(second)
        two = FNGD(second, lr=0.05, steps_per_epoch=2, alpha=1e-2, **options)
        for step in range(STEPS):
            for model, opt in ((replicated, one), (whole, two)):
                opt.zero_grad()
                loss_of(model, batch_of(step % 2, rank, 5)).backward()
            check(grads(second), grads(first))
            for opt in (one, two):
                opt.step()
            check(values(second), values(first))
        one.remove()
        two.remove()


def accumulation_without_synchronising(rank: int, world: int) -> None:
    """no_sync: the sum over passes of the average over ranks; FSDP2 by set_requires_gradient_sync."""
    make = lambda net: NGD(net, lr=0.1, alpha=1e-2)  # noqa: E731
    start = values(build())
    expected = {
        name: sum(average([alone(start, batch_of(k, r, 4), make) for r in range(world)])[name] for k in range(2))
        for name in start
    }
    for wrap in (ddp, sharded):
        model = build()
        if wrap is ddp:
            opt, net = make(model), ddp(model)
        else:
            net = sharded(model)
            opt = make(model)
        for k in range(2):
            waiting = contextlib.nullcontext()
            if wrap is ddp and k == 0:
                waiting = net.no_sync()
            if wrap is sharded:
                net.set_requires_gradient_sync(k == 1)
            with waiting:
                loss_of(net, batch_of(k, rank, 4)).backward()
        check(grads(model), expected)
        opt.step()
        opt.remove()


def global_gram_is_one_process(rank: int, world: int) -> None:
    """gram="global" equals NGD and FNGD on the joined batch; uneven batches in the preconditioned layers."""
    for wrap in (ddp, sharded):
        for fisher in ("empirical", "improved"):
            for sizes in ([4] * world, [3 + r for r in range(world)]):
                options = {"alpha": 1e-3, "fisher": fisher}
                model, single = build(), build()
                make = lambda net, o=options: FNGD(  # noqa: E731
                    net, lr=0.05, steps_per_epoch=1, gram="global", **o
                )
                if wrap is ddp:
                    opt, net = make(model), ddp(model)
                else:
                    net = sharded(model)
                    opt = make(model)
                truth = FNGD(single, lr=0.05, steps_per_epoch=1, **options)
                for step in range(3):
                    own = batch_of(0, rank, sizes[rank])
                    joined = tuple(
                        torch.cat(part) for part in zip(*(batch_of(0, r, s) for r, s in enumerate(sizes)), strict=True)
                    )
                    sent = opt.bytes_sent
                    for each, o, batch in ((net, opt, own), (single, truth, joined)):
                        o.zero_grad()
                        loss_of(each, batch).backward()
                    preconditioned = [name for name in grads(single) if not name.startswith("norm")]
                    expected = grads(single)
                    if len(set(sizes)) > 1:  # averages of averages elsewhere, as always in DDP
                        expected = {name: expected[name] for name in preconditioned}
                    check(grads(model), expected, 1e-9)
                    if len(set(sizes)) > 1:
                        opt.zero_grad()
                        truth.zero_grad()
                        break
                    opt.step()
                    truth.step()
                    check(values(model), values(single), 1e-9)
                    # x and z of every layer; 16 bytes for each layer and for the end of the pass.
                    size = sizes[rank]
                    numbers = size * (1 * 25 + 4 * 9 + 9 * (4 + 6) + (6 + 4)) + (
                        3 * size if fisher == "improved" else 0
                    )
                    assert opt.bytes_sent - sent == (8 * numbers + 4 * 16 if step == 0 else 16)
                opt.remove()
                truth.remove()


def global_gram_in_float32(rank: int, world: int) -> None:
    """gram="global" in single precision: FNGD and NGD within 1e-4 of one process on the joined batch."""
    makes = (
        lambda net, **o: NGD(net, lr=0.05, alpha=1e-2, **o),
        lambda net, **o: FNGD(net, lr=0.05, alpha=1e-2, steps_per_epoch=2, **o),
    )
    for wrap in (ddp, sharded) if SHARDED_FLOAT32 else (ddp,):
        for make in makes:
            model, single = build().float(), build().float()
            if wrap is ddp:
                opt, net = make(model, gram="global"), ddp(model)
            else:
                net = sharded(model)
                opt = make(model, gram="global")
            truth = make(single)
            for step in range(4):
                for each, o, (x, y) in (
                    (net, opt, batch_of(step % 2, rank, 4)),
                    (single, truth, joined_batch(step % 2, [4] * world)),
                ):
                    o.zero_grad()
                    loss_of(each, (x.float(), y)).backward()
                check(grads(model), grads(single), 1e-4)
                opt.step()
                truth.step()
                check(values(model), values(single), 1e-4)
            opt.remove()


def clipping_agrees_between_ranks(rank: int, world: int) -> None:
    model = build()
    opt = NGD(model, lr=0.05, kl_clip=1e-5, momentum=0.0)
    net = ddp(model)
    for step in range(3):
        opt.zero_grad()
        loss_of(net, batch_of(step, rank, 3 + rank)).backward()
        opt.step()
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, values(model))
    assert all(torch.equal(other[name], value) for other in everyone for name, value in values(model).items())


SCENARIOS = (
    directions_are_averaged,
    coefficients_by_sample_reach_every_process,
    sharded_equals_replicated,
    accumulation_without_synchronising,
    global_gram_is_one_process,
    global_gram_in_float32,
    clipping_agrees_between_ranks,
    *joined_factors.SCENARIOS,
    *joined_folded.SCENARIOS,
    *joined_options.SCENARIOS,
    *joined_branches.SCENARIOS,
)


def main(rank: int, world: int, store: str) -> None:
    """Runs every scenario in one process of several; prints a line for each that held."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group(
        "gloo", init_method=Path(store).as_uri(), rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120)
    )
    for scenario in SCENARIOS:
        scenario(rank, world)
        print(f"{scenario.__name__} held", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def gloo_is_missing() -> bool:
    return not (dist.is_available() and dist.is_gloo_available())


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def held(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each process printed: all scenarios in one start, as importing torch takes longer than they do."""
    world, folder = request.param, tmp_path_factory.mktemp("gloo")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), str(folder / "store")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        return [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.mark.skipif(gloo_is_missing(), reason="torch was built without gloo")
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_several_processes(held: list[str], scenario: str) -> None:
    for rank, printed in enumerate(held):
        assert f"{scenario} held" in printed, f"rank {rank}:\n{printed[-3000:]}"


def test_one_process_needs_no_torch_distributed() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        first = build()
        second = copy.deepcopy(first)
        batch = batch_of(0, 0, 6)
        opts = [NGD(first, gram="global"), NGD(second)]
        for model in (first, second):
            loss_of(model, batch).backward()
        check(grads(first), grads(second))
        assert opts[0].bytes_sent == 0
    finally:
        torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
