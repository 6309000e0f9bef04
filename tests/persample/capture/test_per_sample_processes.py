"""`per_sample` and `grad` in one and two gloo processes: replicas are right, sharded models are told by name."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import build
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import persample

OPTIONS: list[dict[str, Any]] = [
    {}, {"hold": "graph"}, {"chunk_size": 2}, {"coupled": "rows"}, {"check": False},
    {"backend": "hooks"}, {"backend": "vmap"}, {"backend": "auto"},
]  # fmt: skip


def squares(y: Tensor, _: Any) -> Tensor:
    return y.square().sum(1)


class Counting(nn.Module):
    """Buffers, which DDP sends to all processes before each pass, and a layer that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.other = nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2)
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.norm(self.one(x)).tanh())


def replicas_have_their_own_samples(rank: int, world: int) -> None:
    """Also where each process makes another number of passes."""
    model = Counting()
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    for step, options in enumerate(OPTIONS):
        x = torch.randn(4 + 3 * rank, 3, generator=torch.Generator().manual_seed(10 * step + rank))
        expected = persample.per_sample(Counting(), squares, x)
        found = persample.per_sample(ddp, squares, x, **options)
        torch.testing.assert_close(found.norms(), expected.norms())
        assert set(found.unused) == {"module.spare.weight", "module.spare.bias"}
        for name, rows in found.grads().items():
            torch.testing.assert_close(rows, expected.grads()[name.removeprefix("module.")])
        alone = persample.grad(squares(model(x), None), model.parameters())
        torch.testing.assert_close(alone[0], expected.grads()["one.weight"])
        if rank == 0:  # a pass more than the others
            persample.per_sample(ddp, squares, x, **options)
    ddp(torch.ones(2, 3)).sum().backward()  # and training goes on
    assert model.one.weight.grad is not None


def other_wrappers(rank: int, world: int) -> None:
    x = torch.randn(5, 3)
    expected = persample.per_sample(Counting(), squares, x).norms()
    for wrap in (nn.DataParallel, lambda model: torch.compile(model, backend="aot_eager")):
        for options in OPTIONS:
            found = persample.per_sample(wrap(Counting()), squares, x, **options)
            torch.testing.assert_close(found.norms(), expected)


def fsdp1(use_orig_params: bool) -> Callable[[], nn.Module]:
    return lambda: FullyShardedDataParallel(Counting(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def in_parts() -> nn.Module:
    model = build()
    for part in (model.inner, model.head):
        fully_shard(part, mesh=mesh())
    return model


def tensor_parallel() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return parallelize_module(model, mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()})


SHARDED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "FSDP1": (fsdp1(False), "FlatParameter"),
    "FSDP1 with the model's parameters": (fsdp1(True), "FlatParameter"),
    "FSDP2": (lambda: fully_shard(Counting(), mesh=mesh()), "DTensor"),
    "FSDP2 of some layers": (in_parts, "DTensor"),
    "tensor parallel": (tensor_parallel, "DTensor"),
    "frozen but for one": (lambda: only_spare(fully_shard(Counting(), mesh=mesh())), "DTensor|FSDPModule"),
}


def only_spare(model: Any) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("spare"))
    return model


def sharded_models_are_told(rank: int, world: int) -> None:
    x = torch.randn(5, 3)
    for what, (make, word) in SHARDED.items():
        model = make()
        for options in OPTIONS:
            for _ in range(2):
                told(
                    lambda options=options, model=model: persample.per_sample(model, squares, x, **options), word, what
                )
        model = make()
        told(lambda model=model: persample.grad(torch.ones(3), trainable(model)), word, what)
    model = fully_shard(Counting(), mesh=mesh())
    sharded, losses = trainable(model), squares(model(x), None)
    told(lambda: persample.grad(losses, sharded), "DTensor", "after a pass")
    rows = persample.grad(losses, trainable(model))  # whole, until the backward pass
    torch.testing.assert_close(rows[0], persample.per_sample(Counting(), squares, x).grads()["one.weight"])


def trainable(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def told(call: Callable[[], Any], word: str, what: str) -> None:
    with pytest.raises(persample.PerSampleError, match=word) as error:
        call()
    assert "not sharded" in str(error.value) or "wrap or copy" in str(error.value), what


def gradients_are_averaged(rank: int, world: int) -> None:
    """As DistributedDataParallel averages them: over batches of other sizes, passes without exchange, unused layers."""
    ddp, plain = (nn.parallel.DistributedDataParallel(Counting(), find_unused_parameters=True) for _ in range(2))
    for step in range(3):
        x = torch.randn(4 + 3 * rank, 3, generator=torch.Generator().manual_seed(10 * step + rank))
        exchanged = step != 1
        with nullcontext() if exchanged else plain.no_sync():
            squares(plain(x), None).sum().backward()
        ddp(x)  # a pass that nobody goes back through
        persample.per_sample(ddp, squares, x).backward(process_group=ddp.process_group if exchanged else None)
        for mine, theirs in zip(ddp.parameters(), plain.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None or not theirs.grad.any())
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad)
    alone, expected = Counting(), Counting()
    persample.per_sample(alone, squares, torch.ones(4 * rank, 3)).backward(process_group=dist.group.WORLD)
    everywhere = torch.ones(sum(4 * each for each in range(world)), 3)  # no samples in the first process
    (squares(expected(everywhere), None).sum() / world).backward()
    if len(everywhere):
        torch.testing.assert_close(alone.one.weight.grad, expected.one.weight.grad)


SCENARIOS = (replicas_have_their_own_samples, other_wrappers, sharded_models_are_told, gradients_are_averaged)


def main(rank: int, world: int, store: str) -> None:
    """Runs every scenario in one process of several; prints a line for each that held."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group(
        "gloo", init_method=Path(store).as_uri(), rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    for scenario in SCENARIOS:
        scenario(rank, world)
        print(f"{scenario.__name__} held", flush=True)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2])
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


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_several_processes(held: list[str], scenario: str) -> None:
    for rank, printed in enumerate(held):
        assert f"{scenario} held" in printed, f"rank {rank}:\n{printed[-3000:]}"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
