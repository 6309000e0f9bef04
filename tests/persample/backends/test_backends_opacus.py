"""The `opacus` backend: what it refuses, and its wrong answers caught."""

from __future__ import annotations

import sys

import pytest
import torch
from capturing import X, needs_opacus, network, squares
from torch import nn

import persample


def test_opacus_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opacus", "opacus.grad_sample"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(persample.UnsupportedError, match=r"pip install 'opacus>=1\.5'"):
        persample.per_sample(network(), squares, X, backend="opacus")


@needs_opacus
def test_opacus_refusals() -> None:
    with pytest.raises(persample.UnsupportedError, match=r"training mode alone.*layer '0'"):
        persample.per_sample(network().eval(), squares, X, backend="opacus")
    normed = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).double()
    with pytest.raises(persample.UnsupportedError, match=r"Opacus refuses this model: .*buffers"):
        persample.per_sample(normed, squares, X, backend="opacus")


@needs_opacus
def test_opacus_with_the_batch_second_is_caught() -> None:
    """As many positions as samples: its rows have the right shape and the right sum, and belong to nobody."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    with pytest.raises(persample.CheckError, match="opacus"):
        persample.per_sample(model, lambda out, _: out.square().sum((0, 2)), x, backend="opacus")
