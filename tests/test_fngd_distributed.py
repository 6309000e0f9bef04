"""NGD and FNGD in several gloo processes under DDP and FSDP2, against one process with explicitly built directions."""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from fngd import FNGD, NGD

STEPS = 5


class Model(nn.Module):
    """A convolution, a linear layer with positions, a normalisation, a head without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.inner = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x), inplace=True).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.inner(x)).tanh().mean(1))


def build() -> Model:
    torch.manual_seed(0)
    return Model()


def batch_of(step: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(size, 1, 5, 5, generator=generator), torch.randint(4, (size,), generator=generator)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def grads(model: nn.Module) -> dict[str, Tensor]:
    result = {}
    for name, p in model.named_parameters():
        grad: Any = p.grad
        result[name.removeprefix("module.")] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    return result


def values(model: nn.Module) -> dict[str, Tensor]:
    full = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in full.items()}


def check(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, value in expected.items():
        error = ((got[name] - value).norm() / value.norm().clamp_min(1e-300)).item()
        assert error <= tolerance, f"{name}: relative deviation {error:.1e}"


def average(all_grads: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in all_grads]).mean(0) for name in all_grads[0]}


def alone(state: dict[str, Tensor], batch: tuple[Tensor, Tensor], make: Callable[[Any], Any]) -> dict[str, Tensor]:
    """The gradients one process gets on a batch."""
    model = build()
    model.load_state_dict(state)
    opt = make(model)
    loss_of(model, batch).backward()
    opt.remove()
    return grads(model)


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: Model) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model.inner, model.conv):
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


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
                    # x and z of every layer, one size for each layer; stored coefficients need nothing.
                    size = sizes[rank]
                    numbers = size * (1 * 25 + 4 * 9 + 9 * (4 + 6) + (6 + 4)) + (
                        3 * size if fisher == "improved" else 0
                    )
                    assert opt.bytes_sent - sent == (8 * numbers + 3 * 8 if step == 0 else 0)
                opt.remove()
                truth.remove()


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
    sharded_equals_replicated,
    accumulation_without_synchronising,
    global_gram_is_one_process,
    clipping_agrees_between_ranks,
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
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
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
