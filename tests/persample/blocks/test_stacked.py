"""Stacked parameters, of which a use has one slice: nothing is formed of all slices, and every quantity is exact."""

from __future__ import annotations

import pytest
import torch
from oracle import clipped_sum, loop_grads, norms, rel_err
from torch import Tensor, nn
from torch.nn import functional as F

import persample


class Stack(nn.Module):
    """Experts whose weights, and biases, are slices of one parameter: tokens are cut among them by `route`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(3, 4))
        self.last = nn.Parameter(torch.randn(4, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        choice = (rows.sum(1) > 0).long() + (rows[:, 0] > 0).long()
        out = rows.new_zeros(len(rows), 5)
        weights, biases = (each.unbind() for each in (self.weight, self.bias))
        for expert in range(3):
            index = (choice == expert).nonzero()[:, 0]
            chosen = rows[index]
            if self.how == "linear":
                hidden = F.linear(chosen, self.weight[expert], self.bias[expert])
            elif self.how == "unbind":
                hidden = F.linear(chosen, weights[expert], biases[expert])
            elif self.how == "negative":
                hidden = F.linear(chosen, self.weight[expert - 3], self.bias[expert - 3])
            else:  # twice, and one slice for all
                hidden = F.linear(chosen, self.weight[expert]) + chosen @ self.weight[0].mT + self.bias[expert]
            out = out.index_add(0, index, hidden.tanh() @ self.last[:, :, expert])
        return out.view(*x.shape[:2], 5).sum(1)


def squares(outputs: Tensor, _: object) -> Tensor:
    return outputs.square().sum(1)


@pytest.mark.parametrize("options", [{}, {"hold": "graph"}, {"chunk_size": 3}])
@pytest.mark.parametrize("how", ["linear", "unbind", "negative", "twice"])
@pytest.mark.usefixtures("double")
def test_every_quantity_is_that_of_the_loop(how: str, options: dict) -> None:
    model = Stack(how)
    x, y = torch.randn(5, 7, 6), torch.randn(4, 7, 6)
    expected, other = (loop_grads(model, squares, each, None) for each in (x, y))
    found = persample.per_sample(model, squares, x, **options)
    c = torch.randn(5)
    vectors = {name: torch.randn_like(each) for name, each in model.named_parameters()}
    flat, others = (torch.cat([rows.flatten(1) for rows in each.values()], 1) for each in (expected, other))
    assert rel_err(found.grads(), expected) < 1e-12
    assert rel_err(found.norms(), norms(expected)) < 1e-12
    assert rel_err(found.gram(), flat @ flat.T) < 1e-12
    assert rel_err(found.gram(other=persample.per_sample(model, squares, y)), flat @ others.T) < 1e-12
    assert rel_err(found.weighted_sum(c), {n: torch.tensordot(c, each, 1) for n, each in expected.items()}) < 1e-12
    assert rel_err(found.dot(vectors), flat @ torch.cat([each.flatten() for each in vectors.values()])) < 1e-12
    assert rel_err(found.clipped_sum(1.0), clipped_sum(expected, 1.0)) < 1e-12


@pytest.mark.usefixtures("double")
def test_slices_are_kept_apart() -> None:
    for how in ("linear", "unbind", "negative"):
        found = persample.per_sample(Stack(how), squares, torch.randn(5, 7, 6))
        assert {name: [type(each).__name__ for each in blocks] for name, blocks in found.blocks.items()} == {
            "weight": ["Stacked"], "bias": ["Stacked"], "last": ["Stacked"],
        }  # fmt: skip
        assert "3 slices apart" in found.explain()[0].algorithm


class Grouped(nn.Module):
    """Tokens sorted by expert and one grouped product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.weight = nn.Linear(16, 4), nn.Parameter(torch.randn(4, 8, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        scores, experts = self.gate(rows).softmax(1).max(1)
        order = experts.argsort(stable=True)
        ends = experts.bincount(minlength=4).cumsum(0).to(torch.int32)
        found = torch._grouped_mm(rows[order], self.weight.mT, offs=ends)
        return (torch.zeros_like(found).index_copy(0, order, found) * scores[:, None]).view(*x.shape[:2], 8).sum(1)


def without_grouped_products() -> str:
    """What torch says of the smallest grouped product on this machine; "" where it forms it."""
    try:
        torch._grouped_mm(torch.ones(16, 16), torch.ones(1, 16, 16), offs=torch.tensor([16], dtype=torch.int32))
    except (RuntimeError, AttributeError) as error:
        return f"torch {torch.__version__} has no grouped product here: {error}"
    return ""


@pytest.mark.skipif(bool(without_grouped_products()), reason=without_grouped_products() or "it has")
def test_grouped_products() -> None:
    model, x = Grouped(), torch.randn(6, 5, 16)
    expected = loop_grads(model, squares, x, None)
    for _ in range(2):
        found = persample.per_sample(model, squares, x)
        assert rel_err(found.grads(), expected) < 1e-5
        assert rel_err(found.norms(), norms(expected)) < 1e-5
        assert {use.rule for use in found.explain() if use.parameter == "weight"} == {"grouped_mm"}
