"""reweight: models in models, and models that call themselves."""

from __future__ import annotations

import pytest
import torch
from passes import B, Loop, Mode, each_asking, every_mode, modules_of, same, squares, step
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("double")


class Nested(nn.Module):
    """A model with layers of its own that calls another model twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(6, 6), inner, nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.after(self.inner(self.before(x), 2)), 1)


@every_mode
def test_nested_models(mode: Mode) -> None:
    """Reweighting the outer one; then the inner one alone, of which each call is a pass of its own."""
    model, x = Nested(Loop(nn.Linear(6, 6))), torch.randn(B, 6)
    expected = mode.expected(model, squares(model(x)))
    with mode.on(model):
        same(step(model, lambda: squares(model(x))), expected)
    inner = {f"inner.{path}": names for path, names in modules_of(model.inner).items()}
    inner = {path: [f"inner.{name}" for name in names] for path, names in inner.items()}
    fixed = Mode(mode.joint, False)
    expected = fixed.expected(model, squares(model(x)), inner)
    with fixed.on(model.inner):
        for _ in range(2):
            same(step(model, lambda: squares(model(x))), expected)


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.weight = nn.Linear(3, 3), nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        h = self(x, depth - 1) if depth else x
        return F.linear(self.layer(h).tanh(), self.weight)


@each_asking
def test_a_model_that_calls_itself(mode: Mode) -> None:
    model, x = Recursive(), torch.randn(B, 3)
    expected = mode.expected(model, squares(model(x)))
    with mode.on(model):
        for _ in range(2):
            same(step(model, lambda: squares(model(x))), expected)


@each_asking
def test_functions_of_a_model_that_calls_itself_are_refused(mode: Mode) -> None:
    model, x = Recursive(), torch.randn(B, 3)
    with mode.on(model, functions=True), pytest.raises(RuntimeError, match="called itself in its own forward"):
        model(x)
    with mode.on(model):  # nothing of that is left
        model(x).sum().backward()
