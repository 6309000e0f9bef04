"""Misuse of Gauss–Newton gets a sentence: options, residuals and groups that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from residuals import flat, network, problem
from torch import nn

from fngd import GaussNewton
from fngd.least_squares.damping import Adaptive
from fngd.least_squares.systems import SketchOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr=0.0; it must be > 0"),
        ({"damping": -1.0}, "damping=-1.0; it must be ≥ 0"),
        ({"damping": "lm"}, "damping='lm' is unknown"),
        ({"momentum": 1.0}, "momentum=1.0; it must be at least 0 and less than 1"),
        ({"gram": "dense"}, "gram='dense' is unknown; choose one of"),
        ({"solve": "cg"}, "solve='cg' is unknown; choose one of"),
        ({"gram": "factored", "solve": "sketch"}, "leave one of them out"),
        ({"chunk_size": 0}, "chunk_size=0; it must be a whole number of at least 1"),
        ({"max_samples": -1}, "max_samples=-1"),
        ({"weights": {"a": -1.0}}, r"weights\['a'\]=-1.0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussNewton(nn.Linear(2, 1), **options)


def test_option_objects_out_of_range() -> None:
    with pytest.raises(ValueError, match="decrease ≤ 1"):
        Adaptive(decrease=2.0)
    with pytest.raises(ValueError, match="sketch rank=0"):
        SketchOptions(rank=0)
    with pytest.raises(ValueError, match="tolerance=0"):
        SketchOptions(tolerance=0.0)
    with pytest.raises(ValueError, match="one real floating-point dtype"):
        GaussNewton([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1).double())])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda r: r.square().mean(), ValueError, "is a scalar: a loss, perhaps"),
        (lambda r: r.unsqueeze(1), ValueError, r"has shape \[4, 1\]; it must be \[B\]"),
        (lambda r: r[:0], ValueError, "is empty"),
        (lambda r: {}, ValueError, "no residuals"),
        (lambda r: r.detach(), ValueError, "no residual depends on a parameter"),
        (lambda r: r / 0, ValueError, "not finite at the current parameters.*residual.: 4"),
        (lambda r: r.long(), TypeError, "must be real floating-point"),
        (lambda r: 3.0, TypeError, "returned float"),
        (lambda r: [r, 3.0], TypeError, "'1' is float"),
        (lambda r: (r, r.float()), ValueError, "must have one dtype"),
    ],
)
def test_residuals_of_the_wrong_kind(change: Callable, error: type[Exception], message: str) -> None:
    net, x = network(), torch.rand(4, 2).double()
    before = flat(net.parameters())
    with pytest.raises(error, match=message):
        GaussNewton(net).step(lambda: change(net(x).squeeze(1)))
    assert torch.equal(flat(net.parameters()), before)


def test_derivatives_that_are_not_finite_are_named() -> None:
    w = nn.Parameter(torch.zeros(2).double())
    for options in ({}, {"solve": "parameters"}, {"solve": "sketch"}):
        with pytest.raises(ValueError, match="not finite"):
            GaussNewton([w], check=False, **options).step(lambda: torch.sqrt(w) + 1)
    assert torch.equal(w.detach(), torch.zeros(2).double())


def test_unknown_groups_and_missing_closures() -> None:
    net, closure = problem()
    with pytest.raises(
        ValueError, match=r"weights name \['data'\]; the closure's groups are \['interior', 'boundary'\]"
    ):
        GaussNewton(net, weights={"data": 1.0}).step(closure)
    with pytest.raises(ValueError, match="needs residuals"):
        GaussNewton(net).step()
    with pytest.raises(ValueError, match=r"damping gave -1\.0 in step 0"):
        GaussNewton(net, damping=lambda step: -1.0).step(closure)
    plain = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"type nn\.Parameter"):
        GaussNewton([plain], gram="factored").step(lambda: plain * 2)
    GaussNewton([plain], gram="rows").step(lambda: plain * 2)
