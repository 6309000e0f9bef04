"""Backends leave nothing behind in a model, whether they succeed, refuse or are interrupted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capturing import Broken, X, every_backend, needs_opacus, network, squares, state
from torch import Tensor, nn

import persample


@needs_opacus
@every_backend
@pytest.mark.parametrize("where", ["nowhere", "loss", "model"])
def test_nothing_stays_behind(backend: str, where: str) -> None:
    model = nn.Sequential(network(), Broken()) if where == "model" else network()
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number)
    before = state(model)

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        if where == "loss":
            raise ArithmeticError("in the middle")
        return squares(outputs, targets)

    if where == "nowhere":
        persample.per_sample(model, loss, X, backend=backend).norms()
    else:
        with pytest.raises(ArithmeticError, match="in the middle"):
            persample.per_sample(model, loss, X, backend=backend)
    assert state(model) == before


@needs_opacus
@every_backend
def test_refusals_leave_nothing_behind(backend: str) -> None:
    """Batch normalisation in training mode: refused by every backend, but the statistics follow one forward pass."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()
    before = state(model)
    with pytest.raises(persample.PerSampleError):
        persample.per_sample(model, squares, X, backend=backend)
    buffers = len(list(model.buffers()))
    assert state(model)[:-buffers] == before[:-buffers]
