"""Models and steps of private training: what the tests of `persample.opacus` share. Skips whom Opacus is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import loop_grads, norms
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from persample.opacus import GradSampleModule

opacus = pytest.importorskip("opacus")
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping  # noqa: E402
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping  # noqa: E402

BOUND = 0.3


def convnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 4))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU] = nn.LSTM, batch_first: bool = True) -> None:
        super().__init__()
        self.rnn, self.last = kind(6, 5, batch_first=batch_first), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.rnn(x)[0]
        return self.last(out[:, -1] if self.rnn.batch_first else out[-1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.last = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(x, x, x, need_weights=False)[0].mean(1))


class Tied(nn.Module):
    """A table that is the output layer, too, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.inner(self.inner(self.table(tokens)).tanh()).mean(1)
        return hidden @ self.table.weight.T


class Bare(nn.Module):
    """A parameter that no layer owns, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.spare, self.last = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(2)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.mean(1) * self.scale)


def steps(batch: int = 8) -> Tensor:
    return torch.randn(batch, 7, 6)


def tokens(batch: int = 8) -> Tensor:
    return torch.randint(9, (batch, 7))


BEYOND: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any]]] = {
    "lstm": (Recurrent, steps, {}),
    "gru": (lambda: Recurrent(nn.GRU), steps, {}),
    "lstm-time-first": (
        lambda: Recurrent(batch_first=False),
        lambda: torch.randn(7, 8, 6),
        {"batch_first": False},
    ),
    "attention": (Attention, steps, {}),
    "tied": (Tied, tokens, {}),
    "bare": (Bare, steps, {}),
    "convnet": (convnet, lambda: torch.randn(8, 1, 6, 6), {}),
}


def losses_of(outputs: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs, y, reduction="none")


def private(
    model: nn.Module, x: Tensor, y: Tensor, *, ghost: bool, ours: bool = True, rate: float = 0.1, **options: Any
) -> tuple[Any, Any, Any, Any, Any]:
    """Engine, model, optimizer, criterion and loader of one data set."""
    engine = opacus.PrivacyEngine()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=rate)
    own = {k: v for k, v in options.items() if k in ("batch_first", "loss_reduction")}
    module = GradSampleModule(model, ghost=ghost, max_grad_norm=BOUND if ghost else None, **own) if ours else model
    more = {"grad_sample_mode": "ghost", "criterion": nn.CrossEntropyLoss()} if ghost else {}
    arguments = {"noise_multiplier": 1.0, "max_grad_norm": BOUND, **more, **options}
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    module, optimizer, *criterion, loader = engine.make_private(
        module=module, optimizer=optimizer, data_loader=loader, **arguments
    )
    return engine, module, optimizer, *(criterion or [nn.CrossEntropyLoss()]), loader


def step(model: nn.Module, x: Tensor, y: Tensor, *, ghost: bool, **options: Any) -> dict[str, Tensor]:
    """Σ_b min(1, C / ‖g_b‖) g_b as Opacus' optimizer makes it, without noise."""
    reduction = options.setdefault("loss_reduction", "sum")
    module = GradSampleModule(model, ghost=ghost, max_grad_norm=BOUND if ghost else None, **options)
    kind = DPOptimizerFastGradientClipping if ghost else DPOptimizer
    optimizer = kind(
        torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=0.0, max_grad_norm=BOUND,
        expected_batch_size=len(y), loss_reduction=reduction,
    )  # fmt: skip
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    if ghost:
        criterion = DPLossFastGradientClipping(module, optimizer, criterion, reduction)
    for _ in range(3):  # by the plan of the first one
        optimizer.zero_grad()
        criterion(module(x), y).backward()
    optimizer.pre_step()
    scale = len(y) if reduction == "mean" else 1
    return {name: p.grad * scale for name, p in model.named_parameters()}


def expected(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    rows = loop_grads(model, losses_of, x, y)
    factors = (BOUND / (norms(rows) + 1e-6)).clamp(max=1)  # Opacus' own
    assert factors.min() < 1
    return {name: torch.einsum("b,b...->...", factors, each) for name, each in rows.items()}
