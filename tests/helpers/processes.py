"""What the tests in several gloo processes share: a model, each process's batches, DDP, FSDP2, and how to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F


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


SHARDED_FLOAT32 = not torch.__version__.startswith("2.8.")
"""Whether sharded processes average in float32 over gloo; torch 2.8 adds up, without any optimiser of ours, too."""


def check(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10, what: str = "") -> None:
    for name, value in expected.items():
        error = ((got[name] - value).norm() / value.norm().clamp_min(1e-300)).item()
        assert error <= tolerance, f"{what} {name}: relative deviation {error:.1e}"


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


def joined_batch(step: int, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """The batches of all processes as one."""
    parts = [batch_of(step, rank, size) for rank, size in enumerate(sizes)]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def everyone_has(value: Any) -> list[Any]:
    """The value of each process."""
    result: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(result, value)
    return result
