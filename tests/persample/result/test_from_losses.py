"""Losses that were made without a module: the same result as `per_sample` has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import expected, loop_grads_of, rel_err
from torch import nn

import persample
from persample.testing.cases import CASES, Case, call

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("case", [case for case in CASES if not case.coupled], ids=lambda case: case.name)
def test_every_case_as_the_loop(case: Case) -> None:
    model, loss_fn, inputs, targets = case.build()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(1)
    losses = loss_fn(call(model, inputs), targets)
    if not losses.requires_grad or not params:
        with pytest.raises((persample.PerSampleError, ValueError)):
            persample.from_losses(losses, params)
        return
    psg = persample.from_losses(losses, params)
    want = loop_grads_of(losses, params)
    sums = expected(want)
    tolerance = 1e-5 if "float32" in case.tags else 1e-9
    assert rel_err(psg.grads(), want) < tolerance
    assert rel_err(psg.gram("layer"), sums["gram", "layer"]) < tolerance
    assert rel_err(psg.weighted_sum(sums["c"]), sums["weighted_sum"]) < tolerance
    assert rel_err(psg.dot(sums["directions"]), sums["dots"]) < tolerance
    assert rel_err(psg.sum_of_squares(), sums["sum_of_squares"]) < tolerance


def test_names_and_layers() -> None:
    w, v = (torch.randn(3, requires_grad=True) for _ in range(2))
    x = torch.randn(5, 3)
    by_position = persample.from_losses((x @ w).square(), [w, v])
    assert isinstance(by_position, persample.PerSampleGrads)
    assert by_position.layers == {"": ("0", "1")}
    assert by_position.unused == ("1",)
    by_name = persample.from_losses((x @ w).square(), {"a.w": w, "b.v": v})
    assert by_name.layers == {"a": ("a.w",), "b": ("b.v",)}
    torch.testing.assert_close(by_name.norms("layer")["a"], by_position.norms())
    torch.testing.assert_close(persample.from_losses((x @ w).square(), w).norms(), by_position.norms())


@pytest.mark.parametrize("written", ["torch", "numpy"])
def test_a_batch_that_is_written_to_changes_nothing(written: str) -> None:
    """The factors that lie in the batch are copies; what is written is not in them."""
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(6, 4)
    psg = persample.from_losses(model(x).square().sum(1), dict(model.named_parameters()))
    before = {name: rows.clone() for name, rows in psg.grads().items()}
    if written == "torch":
        x.zero_()
    else:
        np.asarray(x)[:] = 0
    torch.testing.assert_close(psg.grads(), before)


def test_the_graph_is_still_there() -> None:
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    losses = model(x).square().sum(1)
    psg = persample.from_losses(losses, model.parameters())
    losses.sum().backward()
    torch.testing.assert_close(psg.weighted_sum(torch.ones(6))["0"], model.weight.grad)


def test_what_is_no_parameter_is_told_by_its_name() -> None:
    w = torch.randn(3, requires_grad=True)
    losses = (torch.randn(5, 3) @ w).square()
    with pytest.raises(ValueError, match=r"params\['b'\] must be a leaf tensor that requires a gradient"):
        persample.from_losses(losses, {"a": w, "b": w * 2})
    with pytest.raises(ValueError, match="params holds no tensor"):
        persample.from_losses(losses, {})
