"""What the tests of training loops share: a small model, every method, and what two runs differ by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from fngd import EKFAC, FNGD, KFAC, MBF, NGD, SKFAC, AdaptiveDamping, Eva, HyLo, Shampoo

STEPS_PER_EPOCH = 5


def build_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 8), nn.Tanh(),
        nn.Linear(8, 3),
    )  # fmt: skip


def data(size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 5, 5, generator=generator), torch.randint(3, (size,), generator=generator)


METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "fngd": lambda model: FNGD(
        model, lr=0.05, steps_per_epoch=STEPS_PER_EPOCH, refresh_epochs=3, control="permuted", seed=5
    ),
    "fngd by sample": lambda model: FNGD(
        model, lr=0.05, steps_per_epoch=STEPS_PER_EPOCH, share="sample", samples=36, weight_decay=1e-3
    ),
    "fngd probed": lambda model: FNGD(
        model, lr=0.05, steps_per_epoch=STEPS_PER_EPOCH, refresh_cosine=1.0, fisher="improved", scale="graft"
    ),
    "ngd": lambda model: NGD(model, lr=0.05, kl_clip=1e-3, nesterov=True, gram="network"),
    "ngd history": lambda model: NGD(model, lr=0.02, history=3, curvature_samples=3, curvature_every=2, kl_clip=1e-2),
    "ngd true": lambda model: NGD(model, lr=0.05, fisher="true", other="adamw", accumulate="joint", seed=5),
    "ngd adaptive": lambda model: NGD(
        model, lr=0.05, momentum=0.0, accumulate="joint", gram="network", adapt_damping=AdaptiveDamping(every=2)
    ),
    "fngd joint": lambda model: FNGD(
        model,
        lr=0.01,
        momentum=0.0,
        steps_per_epoch=STEPS_PER_EPOCH,
        accumulate="joint",
        other="adamw",
        refresh_epochs=2,
        adapt_damping=AdaptiveDamping(every=1),
    ),
    "kfac": lambda model: KFAC(model, lr=0.05, statistics_every=2, inverse_every=5, other="adamw"),
    "kfac cholesky": lambda model: KFAC(model, lr=0.05, inverse_every=3, inverse="cholesky", preset="kfac-pytorch"),
    "ekfac": lambda model: EKFAC(model, lr=0.05, statistics_every=2, inverse_every=3, weight_decay=1e-3),
    "mbf": lambda model: MBF(model, lr=0.05, statistics_every=2, inverse_every=3, rows="each", other="adamw"),
    "hylo": lambda model: HyLo(model, lr=0.02, rank=0.5, steps_per_epoch=STEPS_PER_EPOCH, every=2, threshold=0.1),
    "skfac": lambda model: SKFAC(model, lr=0.05, every=2, positions="subsample", keep=3, seed=5),
    "eva": lambda model: Eva(model, lr=0.05, statistics_every=2, weight_decay=1e-3),
    "shampoo": lambda model: Shampoo(model.parameters(), lr=0.05, block=6, statistics_every=2, inverse_every=5),
}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def deviation(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    a, b = (torch.cat([each[name].double().flatten() for name in expected]) for each in (got, expected))
    return ((a - b).norm() / b.norm()).item()


def same_parameters(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def same_leaves(first: Any, second: Any) -> None:
    """Momentum, factors, decompositions, tables, counters and generators, bit for bit."""
    leaves, others = tree_leaves(first), tree_leaves(second)
    assert len(leaves) == len(others)
    for one, two in zip(leaves, others, strict=True):
        assert torch.equal(one, two) if isinstance(one, Tensor) else one == two


def reference(model: nn.Module, build: Callable[[nn.Module], Any], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The direction in float32, by a copy of the model."""
    net = copy.deepcopy(model)
    opt = build(net)
    F.cross_entropy(net(x), y).backward()
    opt.remove()
    return gradients(net)


def loader(batches: int = 4) -> DataLoader:
    return DataLoader(TensorDataset(*data(8 * batches)), batch_size=8)


def plain_run(name: str, epochs: int, accumulate: int = 1, clip: float | None = None) -> nn.Module:
    """A loop as everybody writes it, with a schedule: what loops of frameworks are compared with."""
    model, batches = build_model(), loader()
    opt = METHODS[name](model)
    schedule = CosineAnnealingLR(opt, epochs * len(batches))
    for _ in range(epochs):
        for number, (x, y) in enumerate(batches):
            (F.cross_entropy(model(x), y) / accumulate).backward()
            if (number + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                opt.step()
                schedule.step()
                opt.zero_grad()
    return model
