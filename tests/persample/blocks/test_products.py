"""The weight gradient in every memory layout, dtype and number of pieces, against a product in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from persample.blocks import products
from persample.blocks.products import weight_product, weight_products
from persample.memory import workspace

LAYOUTS = "rows", "columns", "expanded", "strided"


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same shape and, but for `expanded`, the same values in another memory layout."""
    if layout == "columns":
        return values.mT.contiguous().mT
    if layout == "strided":
        return torch.stack([values, values + 1], 2)[..., 0]
    return values[:1].expand_as(values) if layout == "expanded" else values


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product counts as large, and is cut after a few rows."""
    monkeypatch.setattr(products, "SMALLEST", 1)
    monkeypatch.setattr(products, "LARGE", 1)
    monkeypatch.setattr(products, "FEWEST", 8)
    monkeypatch.setattr(products, "PIECE", 2**9)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    shape=st.tuples(st.integers(1, 24), st.integers(1, 30), st.integers(1, 30)),
    other=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    keeps=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_weight_product_is_the_sum_and_leaves_its_factors_alone(
    shape: tuple[int, int, int], layout: str, other: str, dtype: torch.dtype, weighted: bool, keeps: bool, seed: int
) -> None:
    rows, out, inp = shape
    torch.manual_seed(seed)
    z = laid_out(torch.randn(rows, out, dtype=dtype), layout)
    x = laid_out(torch.randn(rows, inp, dtype=dtype), other)
    c = torch.randn(rows, dtype=dtype) if weighted else None
    before = z.clone(), x.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "SMALLEST", 1 if keeps else 2**17)
        result = weight_product(z, x, c)
        following = weight_product(torch.ones_like(z), torch.ones_like(x))  # leaves what was returned as it was
    ones = torch.ones(rows, dtype=dtype) if c is None else c
    factors = z.double(), x.double(), ones.double()
    expected = torch.einsum("ro,ri,r->oi", *factors)
    largest = torch.einsum("ro,ri,r->oi", *(factor.abs() for factor in factors)).max().item()
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * largest)
    torch.testing.assert_close(following, torch.full_like(following, rows))
    assert torch.equal(z, before[0])
    assert torch.equal(x, before[1])


def test_a_factor_with_a_gradient_is_differentiated() -> None:
    z, x, c = torch.randn(20, 3), torch.randn(20, 4), torch.randn(20, requires_grad=True)
    (grad,) = torch.autograd.grad(weight_product(z, x, c).sum(), c)
    torch.testing.assert_close(grad, z.sum(1) * x.sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given_out", [True, False])
@pytest.mark.parametrize("together", [0, 2**18])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_the_weight_products_are_those_of_the_samples(
    batch: int, together: int, given_out: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "TOGETHER", together)
    monkeypatch.setattr(workspace, "SMALLEST", 1)  # each transpose lies where the one before did
    z, x = torch.randn(batch, 20, 3, dtype=dtype), torch.randn(batch, 20, 4, dtype=dtype)
    out = torch.full((batch, 3, 4), torch.nan, dtype=dtype) if given_out else None
    result = weight_products(z, x, out)
    torch.testing.assert_close(result, torch.einsum("bto,bti->boi", z, x))
    assert out is None or result is out
