"""Reductions that use parameters again notice that these are others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import loop_grads
from torch import Tensor, nn

import persample
from persample.unchanged import bits

pytestmark = pytest.mark.usefixtures("double")


def squares(y: Tensor, _: Any) -> Tensor:
    return y.square().flatten(1).sum(1)


def model_of() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def by_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.0001)


def by_step(model: nn.Module, **options: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.Adam(model.parameters(), 1e-6, **options).step()


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "data": by_data,
    "step": by_step,
    "fused": lambda model: by_step(model, fused=True),
}


@pytest.mark.parametrize("options", [{"hold": "graph"}, {"chunk_size": 2}, {"chunk_size": 2, "check": False}])
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_have_changed_are_an_error(change: str, options: dict[str, Any]) -> None:
    model, x = model_of(), torch.randn(5, 3)
    found = persample.per_sample(model, squares, x, **options)
    found.norms()
    CHANGES[change](model)
    with pytest.raises(RuntimeError, match=r"parameters of the model were modified after.*before the optimizer's step"):
        found.grads()


def test_factors_are_as_they_were() -> None:
    model, x = model_of(), torch.randn(5, 3)
    expected = loop_grads(model, squares, x, None)
    found = persample.per_sample(model, squares, x)
    by_step(model, fused=True)
    for name, rows in found.grads().items():
        torch.testing.assert_close(rows, expected[name])


def test_inputs_of_chunks_that_have_changed_are_an_error() -> None:
    x = torch.randn(5, 3)
    found = persample.per_sample(model_of(), squares, x, chunk_size=2)
    x.mul_(1 + 1e-12)
    with pytest.raises(RuntimeError, match="a tensor of the inputs or targets was modified in place"):
        found.norms()


def test_tables_that_a_model_normalises_itself_are_no_change() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 2))
    x = torch.arange(8).view(4, 2)
    found = persample.per_sample(model, squares, x, chunk_size=2)
    rows = found.grads()
    expected = loop_grads(model, squares, x, None)
    for name, each in found.grads().items():
        torch.testing.assert_close(each, expected[name])
        torch.testing.assert_close(rows[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.complex64])
def test_sums_of_bits_are_of_values(dtype: torch.dtype) -> None:
    values = torch.randn(4, 6, dtype=torch.float32).to(dtype)
    for part in (values, values.T, values[:, 1:], values[0, 1:], values[0, 0]):
        before = bits(part)
        assert before == bits(part)
        part.mul_(2)
        assert before != bits(part)
    assert bits(values[:0]) == 0
