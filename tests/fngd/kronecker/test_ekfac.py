"""EKFAC: its direction is that of Q diag(S) Qᵀ built densely, S being what per-sample gradients say in that basis."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preconditioned import (
    Net,
    Positions,
    check_accumulation,
    check_bad_batch,
    check_resume,
    close,
    problems,
    train,
)
from test_kfac import factors
from torch import Tensor, nn

from fngd.kronecker.ekfac import EKFAC, rotated_moments
from fngd.kronecker.kfac import KFAC
from fngd.kronecker.statistics import Kept


def per_sample(problem: Positions) -> Tensor:
    """[groups, N, out, inp] of own losses, a sample and a position at a time."""
    x, z = problem.rows()
    result = torch.zeros(x.shape[0], x.shape[1], z.shape[3], x.shape[3]).to(x)
    for group in range(x.shape[0]):
        for b in range(x.shape[1]):
            for t in range(x.shape[2]):
                result[group, b] += torch.outer(z[group, b, t], x[group, b, t])
    return result


def dense_direction(q: Tensor, moments: Tensor, grad: Tensor, damping: float) -> Tensor:
    """(Q diag(S) Qᵀ + γI)⁻¹ vec(g)."""
    fisher = q @ torch.diag(moments) @ q.T
    return torch.linalg.solve(fisher + damping * torch.eye(len(q)).to(q), grad.flatten()).view_as(grad)


@given(problem=problems(), damping=st.floats(1e-2, 10), reduction=st.sampled_from(["mean", "sum"]))
def test_direction_is_the_dense_one(problem: Positions, damping: float, reduction: str) -> None:
    a, g = factors(problem)
    samples, expected = per_sample(problem), []
    scale = 1 if reduction == "mean" else len(problem.x)
    for group in range(len(a)):
        q = torch.kron(torch.linalg.eigh(g[group])[1], torch.linalg.eigh(a[group])[1])
        rows = samples[group].flatten(1) @ q  # each sample's gradient in the eigenbasis
        grad = problem.mean_gradient()[group] * scale
        expected.append(dense_direction(q, rows.square().mean(0), grad, damping))
    close(problem.step_direction(EKFAC, damping=damping, reduction=reduction), torch.stack(expected))


@given(problem=problems(kinds=("linear",)))
def test_its_matrix_is_nearer_to_the_fisher_matrix_than_kfacs(problem: Positions) -> None:
    a, g = factors(problem)
    rows = per_sample(problem)[0].flatten(1)
    fisher = rows.T @ rows / len(rows)
    q = torch.kron(torch.linalg.eigh(g[0])[1], torch.linalg.eigh(a[0])[1])
    corrected = q @ torch.diag((rows @ q).square().mean(0)) @ q.T
    assert (corrected - fisher).norm() <= (torch.kron(g[0], a[0]) - fisher).norm() + 1e-9 * fisher.norm()


@given(problem=problems(), chunk=st.integers(1, 60))
def test_moments_do_not_depend_on_chunks(problem: Positions, chunk: int) -> None:
    seen: list[Any] = []
    opt = KFAC(problem.layer)
    collect = type(opt._method).collect
    object.__setattr__(
        opt, "_method", _Watching(opt._method, lambda f, bias: seen.append(Kept(list(f), bias)), collect)
    )
    problem.losses().sum().backward()
    opt.remove()
    (kept,) = seen
    whole = list(zip(*kept.chunks(2**30), strict=True))
    parts = [torch.cat(rows, 1) for rows in zip(*kept.chunks(chunk), strict=True)]
    for (one,), many in zip(whole, parts, strict=True):
        assert torch.equal(one, many)
    x, z = parts
    eyes = [torch.eye(each.shape[-1]).to(each).expand(len(each), -1, -1) for each in (x, z)]
    close(rotated_moments(kept, *eyes), torch.einsum("gbto,gbti->gboi", z, x).square().sum(1))


class _Watching:
    """A method that shows what it collects from."""

    def __init__(self, method: Any, show: Any, collect: Any) -> None:
        self._method, self._show, self._collect = method, show, collect

    def collect(self, factors: Any, *, bias: bool, **others: Any) -> Any:
        self._show(factors, bias)
        return self._collect(self._method, factors, bias=bias, **others)


@pytest.mark.usefixtures("double")
def test_basis_is_kept_and_moments_follow_the_gradients() -> None:
    """Three steps with one basis, then a new one: S by hand, sample by sample."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    opt = EKFAC(model, lr=0.0, average=0.7, inverse_every=3, kl_clip=None)
    a = g = moments = q = None
    for k in range(5):
        x, y = torch.randn(6, 3), torch.randn(6, 2)
        loss = (model(x) - y).square().sum(1).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        rows = torch.cat([x, torch.ones(6, 1)], 1)
        z = 2 * (model(x) - y).detach()
        weight = min(1 - 1 / (k + 1), 0.7)
        new_a, new_g = rows.T @ rows / 6, z.T @ z / 6
        a, g = (new_a, new_g) if a is None else (weight * a + (1 - weight) * new_a, weight * g + (1 - weight) * new_g)
        if k % 3 == 0:
            turned = torch.kron(torch.linalg.eigh(g)[1], torch.linalg.eigh(a)[1])
            if q is not None:
                moments = (turned.T @ (q @ torch.diag(moments) @ q.T) @ turned).diagonal()
            q = turned
        own = torch.einsum("bo,bi->boi", z, rows).flatten(1) @ q
        new = own.square().mean(0)
        moments = new if moments is None else weight * moments + (1 - weight) * new
        close(opt._inverses[""]["scales"].flatten(), moments)


@pytest.mark.usefixtures("double")
def test_accumulation_has_the_moments_of_the_joined_batch() -> None:
    check_accumulation(lambda model: EKFAC(model, lr=0.05))


@pytest.mark.parametrize("seed", range(3))
def test_resume_is_bit_for_bit(seed: int) -> None:
    check_resume(lambda model: EKFAC(model, lr=0.05, statistics_every=2, inverse_every=3), seed)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_batch_leaves_factors_and_moments(bad: float) -> None:
    check_bad_batch(lambda model: EKFAC(model, lr=0.0), bad, "_inverses")


@pytest.mark.usefixtures("double")
def test_heavy_damping_is_the_plain_gradient() -> None:
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    opt = EKFAC(model, lr=1e12, momentum=0.0, damping=1e12, kl_clip=None)
    before = model.weight.detach().clone()
    model(x).square().mean().backward()
    opt.step()
    close(before - model.weight.detach(), model.weight.grad)


@pytest.mark.usefixtures("double")
def test_a_frozen_bias_starts_anew() -> None:
    model = Net()
    opt = EKFAC(model, lr=0.05, kl_clip=None)
    train(model, opt, range(2))
    model.inner.bias.requires_grad_(False)
    train(model, opt, range(2, 4))
    assert opt._inverses["inner"]["scales"].shape == (1, 4, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average": 1.0}, "average=1.0; it must be at least 0 and less than 1"),
        ({"inverse_every": 0}, "inverse_every=0; it must be a whole number of at least 1"),
        ({"damping": 0.0}, "damping=0.0; it must be a number > 0"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EKFAC(nn.Linear(3, 2), **options)
