"""The `outputs` backend is never silently wrong: wrong rules, modified tensors, NaN, tiny gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from convnet import batch, cross_entropy, network
from oracle import clipped_sum, loop_grads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import persample
from persample.rules import RULES


@pytest.mark.parametrize("kind", ["AddmmBackward0", "ConvolutionBackward0", "NativeLayerNormBackward0"])
def test_a_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Also where the model's plan had been made and checked with the right rule."""
    model, (x, y) = network(), batch()
    persample.per_sample(model, cross_entropy, x, y)
    right = RULES[kind]

    def wrong(site: object) -> object:
        block = right(site)  # type: ignore[arg-type]
        return type(block)(*(f * 1.01 if isinstance(f, Tensor) else f for f in vars(block).values()))

    monkeypatch.setitem(RULES, kind, wrong)
    with pytest.raises(persample.CheckError, match="do not add up to the batch gradient"):
        persample.per_sample(model, cross_entropy, x, y)
    persample.per_sample(model, cross_entropy, x, y, check=False)


def test_a_modified_input_changes_nothing_or_is_noticed() -> None:
    model, (x, y) = network(), batch()
    norms = persample.per_sample(model, cross_entropy, x, y).norms()
    factors, graph = (persample.per_sample(model, cross_entropy, x, y, hold=hold) for hold in ("factors", "graph"))
    x.zero_()
    torch.testing.assert_close(factors.norms(), norms)
    with pytest.raises(RuntimeError, match="modified in place"):
        graph.norms()


def test_rows_that_take_the_place_of_factors() -> None:
    """Norms form the rows of a convolution: where these are smaller, they are held from then on, and x no longer."""
    model, (x, y) = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(48, 5)).double(), batch()
    x = x.double()
    psg = persample.per_sample(model, cross_entropy, x, y)
    expected = loop_grads(model, cross_entropy, x, y)
    held = {use.parameter: use.block for use in psg.explain()}
    norms = psg.norms()
    assert (held["0.weight"], held["2.weight"]) == ("Conv", "Outer")
    assert {use.parameter: use.block for use in psg.explain()} == {**held, "0.weight": "Dense"}
    x.zero_()
    for name, rows in psg.grads().items():
        torch.testing.assert_close(rows, expected[name])
    torch.testing.assert_close(psg.norms(), norms)
    torch.testing.assert_close(psg.clipped_sum(0.1)["0.weight"], clipped_sum(expected, 0.1)["0.weight"])


def test_nan_stays_with_its_sample() -> None:
    model, (x, y) = network(), batch()
    x[2] = torch.nan
    norms = persample.per_sample(model, cross_entropy, x, y).norms()
    assert norms.isnan().tolist() == [False, False, True, False, False, False]


def test_tiny_gradients_keep_their_owner() -> None:
    """Losses over thirty orders of magnitude: no row is lost."""
    model, x = nn.Linear(4, 3).double(), torch.randn(6, 4).double()
    scale = torch.logspace(-25, 5, 6, dtype=torch.float64)
    psg = persample.per_sample(model, lambda out, s: s * out.square().sum(1), x, scale)
    expected = loop_grads(model, lambda out, s: s * out.square().sum(1), x, scale)
    torch.testing.assert_close(psg.grads()["weight"], expected["weight"], rtol=1e-12, atol=0)


class WritesIntoItsGradient(torch.autograd.Function):
    """Identity whose backward doubles what it is given, in place: what a custom Function must not do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.mul_(2)


def test_a_backward_that_writes_into_a_held_gradient_gives_right_rows_or_none() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            # the sum hands the same gradient to its second linear layer, which holds it, and to the custom Function
            return self.second(h) + WritesIntoItsGradient.apply(h)

    model, x = Model().double(), torch.randn(4, 3, dtype=torch.float64)
    refused = 0
    for _ in range(3):  # the first batch is probed, later ones go by plan if there is one
        try:
            psg = persample.per_sample(model, lambda out, _: out.square().sum(1), x)
        except persample.CheckError:
            refused += 1
            continue
        expected = loop_grads(model, lambda out, _: out.square().sum(1), x, None)
        assert all(torch.allclose(psg.grads()[name], expected[name]) for name in expected)
    assert refused in (0, 3)


@pytest.mark.parametrize("hooked", ["checkpoint", "save_on_cpu"])
def test_saved_tensors_behind_hooks_are_read_once(hooked: str) -> None:
    """Checkpointing may begin between two batches: the graph looks the same."""
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.LayerNorm(3)).double()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.hooked = body, False

        def forward(self, x: Tensor) -> Tensor:
            if not self.hooked:
                return self.body(x)
            if hooked == "checkpoint":
                return checkpoint(self.body, x, use_reentrant=False)  # type: ignore[no-any-return]
            with torch.autograd.graph.save_on_cpu():
                return self.body(x)  # type: ignore[no-any-return]

    model = Model()
    for turn in range(5):
        model.hooked = turn >= 2
        x = torch.randn(4, 3, dtype=torch.float64)
        grads = persample.per_sample(model, lambda out, _: out.square().sum(1), x).grads()
        expected = loop_grads(model, lambda out, _: out.square().sum(1), x, None)
        for name, rows in expected.items():
            torch.testing.assert_close(grads[name], rows, rtol=1e-9, atol=1e-12)
