"""The table of the page on differential privacy: what Opacus' own modules make of a step, and what ours do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import loop_grads, norms, rel_err
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

from persample.opacus import GradSampleModule

opacus = pytest.importorskip("opacus")
from opacus.grad_sample import GradSampleModuleFastGradientClipping  # noqa: E402
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping  # noqa: E402
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping  # noqa: E402
from opacus.validators import ModuleValidator  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore::UserWarning:opacus", "ignore::DeprecationWarning:opacus"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:There is a performance drop"),
]
PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "private.md"
BOUND = 0.3
Make = Callable[[], nn.Module]


class Lambda(nn.Module):
    """Modules, parameters and a function of them."""

    def __init__(self, call: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


class LowRank(nn.Module):
    """A frozen layer and a product of two small ones; with `magnitude` the length of each row is learned (DoRA)."""

    def __init__(self, magnitude: bool) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(5, 2))
        self.magnitude = nn.Parameter(torch.rand(5)) if magnitude else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.b @ self.a
        if self.magnitude is not None:
            weight = weight * (self.magnitude / weight.norm(dim=1))[:, None]
        return F.linear(x, weight, self.base.bias)


def images() -> Tensor:
    return torch.randn(8, 1, 6, 6)


def steps() -> Tensor:
    return torch.randn(8, 7, 6)


def tokens() -> Tensor:
    return torch.randint(9, (8, 7))


MODELS: dict[str, tuple[Make, Callable[[], Tensor]]] = {
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)), images),
    "LSTM": (
        lambda: Lambda(lambda m, x: m.last(m.rnn(x)[0][:, -1]), rnn=nn.LSTM(6, 5, batch_first=True),
                       last=nn.Linear(5, 4)), steps,
    ),
    "attention": (
        lambda: Lambda(lambda m, x: m.last(m.mix(x, x, x)[0].mean(1)), last=nn.Linear(6, 4),
                       mix=nn.MultiheadAttention(6, 2, batch_first=True)), steps,
    ),
    "a table that is the output layer": (
        lambda: Lambda(lambda m, x: m.inner(m.table(x).mean(1)) @ m.table.weight.T, table=nn.Embedding(9, 6),
                       inner=nn.Linear(6, 6)), tokens,
    ),
    "a layer called twice": (
        lambda: Lambda(lambda m, x: m.last(m.inner(m.inner(x[:, 0]).tanh())), inner=nn.Linear(6, 6),
                       last=nn.Linear(6, 4)), steps,
    ),
    "one weight in two layers": (
        lambda: _shared(nn.Sequential(nn.Flatten(), nn.Linear(42, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(),
                                      nn.Linear(6, 6))), steps,
    ),
    "a parameter without a layer": (
        lambda: Lambda(lambda m, x: m.last(x.mean(1) * m.scale), scale=nn.Parameter(torch.rand(6)),
                       last=nn.Linear(6, 4)), steps,
    ),
    "time first inside": (
        lambda: Lambda(lambda m, x: m.last(m.inner(x.transpose(0, 1)).tanh().mean(0)), inner=nn.Linear(6, 5),
                       last=nn.Linear(5, 4)), steps,
    ),
    "LoRA": (lambda: nn.Sequential(LowRank(False), nn.Tanh(), nn.Linear(5, 4)), lambda: torch.randn(8, 6)),
    "DoRA": (lambda: nn.Sequential(LowRank(True), nn.Tanh(), nn.Linear(5, 4)), lambda: torch.randn(8, 6)),
}  # fmt: skip


def _shared(model: nn.Sequential) -> nn.Sequential:
    model[5].weight = model[3].weight
    return model


def losses_of(outputs: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs, y, reduction="none")


def step(model: nn.Module, x: Tensor, y: Tensor, *, ghost: bool, ours: bool) -> dict[str, Tensor]:
    """The clipped sum, as an optimizer of Opacus leaves it."""
    bound = {"max_grad_norm": BOUND} if ghost else {}
    if ours:
        module = GradSampleModule(model, loss_reduction="sum", ghost=ghost, **bound)
    else:
        ModuleValidator.validate(model, strict=True)
        kind = GradSampleModuleFastGradientClipping if ghost else opacus.GradSampleModule
        module = kind(model, loss_reduction="sum", **bound)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = (DPOptimizerFastGradientClipping if ghost else DPOptimizer)(
        torch.optim.SGD(trained, lr=0.1), noise_multiplier=0.0, max_grad_norm=BOUND, expected_batch_size=None,
        loss_reduction="sum",
    )  # fmt: skip
    criterion: Any = nn.CrossEntropyLoss(reduction="sum")
    if ghost:
        criterion = DPLossFastGradientClipping(module, optimizer, criterion, "sum")
    optimizer.zero_grad()
    criterion(module(x), y).backward()
    optimizer.pre_step()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def verdict(name: str, *, ghost: bool, ours: bool) -> str:
    """What becomes of a model: "exact", "wrong" or "refused"."""
    make, data = MODELS[name]
    torch.manual_seed(0)
    model, x, y = make(), data(), torch.randint(4, (8,))
    rows = loop_grads(model, losses_of, x, y)
    factors = (BOUND / (norms(rows) + 1e-6)).clamp(max=1)
    want = {n: torch.einsum("b,b...->...", factors, r) for n, r in rows.items()}
    try:
        found = step(model, x, y, ghost=ghost, ours=ours)
    except Exception:
        return "refused"
    return "exact" if rel_err(found, want) < 1e-9 else "wrong"


def promised() -> dict[str, list[str]]:
    """The rows of the table on the page."""
    cells = re.findall(r"^\| ([^|]+) \| (\w+) \| (\w+) \| (\w+) \| (\w+) \|$", PAGE.read_text(), re.MULTILINE)
    return {name: words for name, *words in cells}


@pytest.mark.parametrize("name", MODELS)
def test_the_page_says_what_is_measured(name: str) -> None:
    ways = [(False, False), (True, False), (False, True), (True, True)]
    found = [verdict(name, ghost=ghost, ours=ours) for ghost, ours in ways]
    assert promised()[name] == found
    assert found[2:] == ["exact", "exact"]


def test_the_table_is_whole() -> None:
    assert promised().keys() == MODELS.keys()
