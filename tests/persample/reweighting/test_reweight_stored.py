"""reweight: what a step computes, and what it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from weighting import FACTORS, B, fixed

from persample.reweighting import LayerGrads, reweight

pytestmark = pytest.mark.usefixtures("double")


def test_a_stored_step_asks_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """With given factors neither Gram matrix nor rows are formed, and no weight gradient is computed twice."""
    from persample.blocks import reductions
    from persample.blocks.convolution import gradients as convolution
    from persample.reweighting import weighted_sum

    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 2)), torch.randn(B, 1, 5, 5)
    calls: list[str] = []
    for name in ("gram", "squared_norms", "materialise", "weighted_sum"):
        monkeypatch.setattr(reductions, name, lambda *args, name=name: pytest.fail(f"{name} was called"))
    conv, linear = convolution.weight_gradient, weighted_sum.weight_product
    monkeypatch.setattr(convolution, "weight_gradient", lambda *args: calls.append("conv") or conv(*args))
    monkeypatch.setattr(weighted_sum, "weight_product", lambda *args: calls.append("linear") or linear(*args))
    with reweight(model, fixed):
        loss = model(x).sin().sum()
        nodes, todo = set(), [loss.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                todo += [parent for parent, _ in node.next_functions]
        # The operations themselves are not connected to their weights.
        assert not {"AddmmBackward0", "ConvolutionBackward0"} & {
            node.name() for node in nodes if any("AccumulateGrad" in str(parent) for parent, _ in node.next_functions)
        }
        loss.backward()
    assert sorted(calls) == ["conv", "linear"]


def test_the_rows_formed_for_a_convolutions_gram_matrix_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from persample.blocks import reductions

    formed, original = [], reductions.materialise

    def materialise(block: object) -> Tensor:
        formed.append(type(block).__name__)
        return original(block)

    def policy(layer: str, grads: LayerGrads) -> Tensor:
        grads.gram()
        assert "weight: Dense" in grads.explain()
        return FACTORS

    monkeypatch.setattr(reductions, "materialise", materialise)
    model, shape = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False)), (2, 5, 6)
    with reweight(model, policy):
        model(torch.randn(B, *shape)).sin().sum().backward()
    assert [kind for kind in formed if kind != "Dense"] == ["Conv"]
