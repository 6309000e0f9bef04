"""Plans and leaves: which input it is that requires a gradient does not matter, which parameter it is does."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from oracle import loop_grads, norms
from torch import Tensor, nn

import persample
from persample.capture.plans import plans_of

reading = importlib.import_module("persample.capture.analysis")


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry, the number of samples, for each batch that was probed."""
    found: list[int] = []
    original = reading.find_uses

    def counted(graph: Any, losses: Tensor, *rest: Any, **options: Any) -> Any:
        found.append(len(losses))
        return original(graph, losses, *rest, **options)

    monkeypatch.setattr(reading, "find_uses", counted)
    return found


class Slope(nn.Module):
    """The network's value and its derivative by the input, which is given a gradient inside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = self.body(x)
        [slope] = torch.autograd.grad(u.sum(), x, create_graph=True)
        return torch.cat([u, slope], 1)


def squares(out: Tensor, _: Any) -> Tensor:
    return out.square().flatten(1).sum(1)


def models() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    image = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return {
        "linear": (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
        "image": (image, (2, 4, 4)),
        "attention": (block, (5, 4)),
    }


@pytest.mark.parametrize("hold", ["factors", "graph"])
@pytest.mark.parametrize("name", models())
def test_inputs_that_require_a_gradient_follow_the_plan(name: str, hold: str, searches: list[int]) -> None:
    """Of nine batches, of two sizes, the first alone is probed, though every input is another tensor."""
    model, shape = models()[name]
    model.double()
    inputs = [torch.randn(6 if place % 3 else 4, *shape, dtype=torch.float64) for place in range(9)]
    for x in inputs:
        found = persample.per_sample(model, squares, x.requires_grad_(), hold=hold)
        expected = loop_grads(model, squares, x.detach(), None)
        for parameter, rows in found.grads().items():
            torch.testing.assert_close(rows, expected[parameter])
        torch.testing.assert_close(found.norms(), norms(expected))
        assert x.grad is None
    assert searches == [4]


def test_targets_that_require_a_gradient_follow_the_plan(searches: list[int]) -> None:
    """A distillation loss whose teacher was not detached."""
    model = nn.Linear(3, 2).double()

    def distance(out: Tensor, y: Tensor) -> Tensor:
        return (out - y).square().sum(1)

    for _ in range(4):
        x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
        found = persample.per_sample(model, distance, x, y.requires_grad_()).grads()
        for parameter, rows in loop_grads(model, distance, x, y.detach()).items():
            torch.testing.assert_close(found[parameter], rows)
    assert searches == [5]


def test_derivatives_by_inputs_keep_their_plan() -> None:
    """The graph of a derivative has the input as a leaf of its own; one plan is kept, not one for each batch."""
    model = Slope().double()
    for _ in range(4):
        x = torch.randn(5, 3, dtype=torch.float64)
        found = persample.per_sample(model, squares, x).grads()
        for parameter, rows in loop_grads(model, squares, x, None).items():
            torch.testing.assert_close(found[parameter], rows)
    assert len(plans_of(model)._plans) == 1


class Turned(nn.Module):
    """A product whose factors change places, and of which two parameters take turns; all of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(2))
        self.turned = self.other = False

    def forward(self, x: Tensor) -> Tensor:
        weight = self.second if self.other else self.first
        return (weight * x if self.turned else x * weight) + 0 * (self.first if self.other else self.second)


def test_parameters_are_told_from_inputs_and_from_each_other() -> None:
    """Graphs that differ in nothing but which of their leaves is which."""
    model = Turned()
    for turned, other in [(False, False), (True, False), (False, True), (True, True), (False, False), (True, True)]:
        model.turned, model.other = turned, other
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        found = persample.per_sample(model, squares, x).grads()
        losses = squares(model(x), None)
        for name, parameter in model.named_parameters():
            rows = [torch.autograd.grad(loss, parameter, retain_graph=True)[0] for loss in losses]
            torch.testing.assert_close(found[name], torch.stack(rows))


def test_a_parameter_that_was_replaced_has_no_plan(searches: list[int]) -> None:
    model = nn.Linear(3, 2).double()
    for _ in range(2):
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        persample.per_sample(model, squares, x)
        persample.per_sample(model, squares, x)
        kept, model.weight = model.weight, nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
    del kept
    assert searches == [5, 5]
