"""reweight: layers and functions that are called another number of times, or not at all."""

from __future__ import annotations

import pytest
import torch
from passes import CELLS, B, Loop, Mode, each_asking, every_mode, groups_of, same, squares, step
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@every_mode
@pytest.mark.parametrize("name", CELLS)
def test_a_layer_is_called_another_number_of_times_in_each_pass(name: str, mode: Mode) -> None:
    build, functions = CELLS[name]
    model, x = Loop(build()), torch.randn(B, 5, 6)
    groups, counts = groups_of(model, functions), (1, 1, 2, 0, 5, 1)
    expected = {n: mode.expected(model, squares(model(x, n)), groups) for n in set(counts)}
    with mode.on(model, functions=bool(functions)):
        for n in counts:
            mode.asked.clear()
            same(step(model, lambda n=n: squares(model(x, n))), expected[n])
            paths = [path for asked in mode.asked for path in asked]
            assert len(paths) == len(set(paths)), "each layer is asked about once"
            assert all(p.grad is None for p in model.cell.parameters()) or n


class Ways(nn.Module):
    """Calls of one layer that do and do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer(x)
        self.layer(2 * x)  # never used
        with torch.no_grad():
            constant = self.layer(3 * x)
        dropped = self.layer(4 * x).detach()
        again = self.layer((first.tanh() + constant).detach())
        kept = self.layer(x.clone().requires_grad_())
        self.unused = kept
        return self.head(first.tanh() + again * dropped + self.layer(torch.zeros_like(x)))


@every_mode
def test_calls_that_do_not_reach_the_loss(mode: Mode) -> None:
    model, x = Ways(), torch.randn(B, 3)
    expected = mode.expected(model, squares(model(x)))
    with mode.on(model):
        for _ in range(3):
            same(step(model, lambda: squares(model(x))), expected)
            assert len(mode.asked) == (1 if mode.joint else 2)
            mode.asked.clear()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.c.weight = self.a.weight  # with a bias of its own: another layer

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.c(self.a(x).relu_()).relu_())


@each_asking
def test_tied_layers_with_fixed_factors(mode: Mode) -> None:
    model, x = Tied(), torch.randn(B, 3)
    expected = mode.expected(model, squares(model(x)), {"all": [name for name, _ in model.named_parameters()]})
    with mode.on(model):
        for _ in range(2):
            same(step(model, lambda: squares(model(x))), expected)
