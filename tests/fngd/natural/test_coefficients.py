"""smw_coefficients against the dense N × N inverse of the damped empirical Fisher matrix."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fngd import smw_coefficients
from fngd.natural.solve.directions import coefficient_factors


def dense_direction(u: Tensor, lam: float) -> Tensor:
    """(λI + UUᵀ/B)⁻¹ g, as equation 5 is written."""
    n, batch = u.shape
    return torch.linalg.inv(lam * torch.eye(n, dtype=u.dtype) + u @ u.T / batch) @ u.mean(1)


@given(
    batch=st.integers(1, 12),
    size=st.integers(1, 30),
    log_alpha=st.floats(-4, 0),
    log_size=st.sampled_from([-8, 0, 5]),
    common=st.floats(0, 3),
    scale=st.sampled_from(["absorb", "per_layer"]),
    absolute=st.booleans(),
)
def test_equals_the_dense_inverse(
    batch: int, size: int, log_alpha: float, log_size: int, common: float, scale: str, absolute: bool
) -> None:
    u = (
        torch.randn(size, batch, dtype=torch.float64) + common * torch.randn(size, 1, dtype=torch.float64)
    ) * 10**log_size
    gram = u.T @ u
    lam = 10**log_alpha * gram.norm().item()
    expected = dense_direction(u, lam) * (lam if scale == "absorb" else 1)
    given_damping = {"damping": lam} if absolute else {"alpha": 10**log_alpha}
    c = smw_coefficients(gram, scale=scale, **given_damping)
    assert c.dtype == torch.float64
    assert (u @ c - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize("alpha", [1e-4, 1e-3, 1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("scale", ["absorb", "per_layer"])
def test_equals_the_dense_inverse_at_the_size_of_a_layer(alpha: float, scale: str) -> None:
    u = torch.randn(200, 128, dtype=torch.float64) + torch.randn(200, 1, dtype=torch.float64)
    lam = alpha * (u.T @ u).norm().item()
    expected = dense_direction(u, lam) * (lam if scale == "absorb" else 1)
    got = u @ smw_coefficients(u.T @ u, alpha=alpha, scale=scale)
    assert (got - expected).norm() <= 1e-8 * expected.norm()
    # A float32 Gram matrix costs the accuracy of its entries, not of the solve.
    single = u.float()
    c = smw_coefficients(single.T @ single, alpha=alpha, scale=scale)
    assert c.dtype == torch.float32
    assert (u @ c.double() - expected).norm() <= 1e-5 * expected.norm()


def test_equation_nine_as_printed() -> None:
    u = torch.randn(20, 6, dtype=torch.float64)
    gram, batch, alpha = u.T @ u, 6, 0.03
    lam = alpha * gram.norm()
    g = u.mean(1)
    inverse = torch.linalg.inv(lam * torch.eye(batch, dtype=u.dtype) + gram / batch)
    remaining = (1 - inverse @ (u.T @ g)) / batch
    torch.testing.assert_close(smw_coefficients(gram, alpha=alpha), remaining)
    torch.testing.assert_close(smw_coefficients(gram, alpha=alpha, scale="per_layer"), remaining / lam)


def test_many_matrices_at_once() -> None:
    u = torch.randn(3, 2, 9, 5, dtype=torch.float64)
    grams = u.mT @ u
    got = smw_coefficients(grams, alpha=1e-2)
    assert got.shape == (3, 2, 5)
    for index in ((0, 0), (2, 1)):
        torch.testing.assert_close(got[index], smw_coefficients(grams[index], alpha=1e-2))


def test_heavy_damping_is_the_mean() -> None:
    gram = torch.randn(7, 7, dtype=torch.float64)
    gram = gram @ gram.T
    for alpha, tolerance in ((1e3, 1e-3), (1e9, 1e-9), (math.inf, 0.0)):
        c = smw_coefficients(gram, alpha=alpha)
        assert (7 * c - 1).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_gradients(dtype: torch.dtype) -> None:
    zero = torch.zeros(4, 4, dtype=dtype)
    for options in ({"alpha": 1e-2}, {"alpha": 1e-2, "scale": "per_layer"}, {"damping": 3.0}):
        torch.testing.assert_close(smw_coefficients(zero, **options), torch.full((4,), 0.25, dtype=dtype))
    both = smw_coefficients(torch.stack([zero, torch.eye(4, dtype=dtype)]), alpha=0.5)
    torch.testing.assert_close(both[0], torch.full((4,), 0.25, dtype=dtype))
    torch.testing.assert_close(both[1], smw_coefficients(torch.eye(4, dtype=dtype), alpha=0.5))


def test_the_scale_of_the_loss() -> None:
    u = torch.randn(9, 5)
    gram = u.T @ u
    expected = smw_coefficients(gram, alpha=1e-3)
    for power in (-34, 30):  # where the squares of the entries are no float32 numbers
        torch.testing.assert_close(smw_coefficients(gram * 10.0**power, alpha=1e-3), expected, rtol=1e-4, atol=0)


def test_batch_of_one() -> None:
    got = smw_coefficients(torch.tensor([[4.0]], dtype=torch.float64), alpha=0.25)
    torch.testing.assert_close(got, torch.tensor([0.25 / 1.25], dtype=torch.float64))


def test_half_precision() -> None:
    u = torch.randn(9, 4).bfloat16().float()
    got = smw_coefficients((u.T @ u).bfloat16(), alpha=0.1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, smw_coefficients(u.T @ u, alpha=0.1), rtol=0.05, atol=0)


def test_a_gram_matrix_that_rounding_made_indefinite() -> None:
    u = torch.ones(3, 6) * torch.rand(6) + 1e-5 * torch.randn(3, 6)
    gram = u.T @ u - 1e-7 * torch.eye(6)  # within the rounding of its entries
    c = smw_coefficients(gram, alpha=1e-9)
    assert c.isfinite().all()
    assert (c >= 0).any()
    # Beyond that it is no Gram matrix: the plain mean rather than a wild step.
    torch.testing.assert_close(smw_coefficients(-torch.eye(3), alpha=1e-3), torch.full((3,), 1 / 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_are_not_hidden(bad: float) -> None:
    gram = torch.eye(3)
    gram[0, 1] = gram[1, 0] = bad
    both = smw_coefficients(torch.stack([gram, torch.eye(3)]), alpha=0.1)
    assert both[0].isnan().all()
    assert both[1].isfinite().all()
    factors, good = coefficient_factors(gram, alpha=0.1, damping=None, scale="absorb", reduction="mean")
    assert not good
    torch.testing.assert_close(factors, torch.ones(3))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", ["absorb", "per_layer"])
@pytest.mark.parametrize("damping", [{"alpha": 0.01, "damping": None}, {"alpha": None, "damping": 0.3}])
def test_factors_of_the_plain_gradient(reduction: str, scale: str, damping: dict) -> None:
    """The shares that backward sees are g_b/B under a mean; the direction is the same."""
    u = torch.randn(20, 6, dtype=torch.float64)
    shares = u / 6 if reduction == "mean" else u
    factors, good = coefficient_factors(shares.T @ shares, scale=scale, reduction=reduction, **damping)
    assert good
    lam = damping["damping"] or 0.01 * (u.T @ u).norm().item()
    expected = dense_direction(u, lam) * (lam if scale == "absorb" else 1) * (1 if reduction == "mean" else 6)
    torch.testing.assert_close(shares @ factors, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one"),
        ({"alpha": 1.0, "damping": 1.0}, "give exactly one"),
        ({"alpha": 0.0}, "alpha=0.0; it must be > 0"),
        ({"alpha": math.nan}, "alpha=nan; it must be > 0"),
        ({"damping": -1.0}, "damping=-1.0; it must be > 0"),
        ({"alpha": 1.0, "scale": "other"}, r"scale='other' is unknown; choose one of \['absorb', 'per_layer'\]"),
        ({"alpha": math.inf, "scale": "per_layer"}, "use scale='absorb'"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smw_coefficients(torch.eye(2), **options)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0)])
def test_no_gram_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(Exception, match=r"must be \[..., B, B\]|violates type hint"):
        smw_coefficients(torch.ones(shape), alpha=0.1)
