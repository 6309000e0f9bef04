"""Eva: its direction is that of the dense (baᵀ)(baᵀ)ᵀ + γI; running means, the public code's preset, resume, NaN."""

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
from torch import Tensor, nn

from fngd.kronecker.eva import Eva


def dense_direction(a: Tensor, b: Tensor, grad: Tensor, damping: float) -> Tensor:
    result = []
    for a_k, b_k, grad_k in zip(a, b, grad, strict=True):
        u = torch.kron(b_k, a_k)
        fisher = torch.outer(u, u) + damping * torch.eye(len(u)).to(u)
        result.append(torch.linalg.solve(fisher, grad_k.flatten()).view_as(grad_k))
    return torch.stack(result)


@given(problem=problems(), damping=st.floats(1e-2, 10), mean=st.booleans())
def test_direction_is_the_dense_one(problem: Positions, damping: float, mean: bool) -> None:
    x, z = problem.rows()
    count = x.shape[1]
    a, b = x.mean((1, 2)), z.sum(2).mean(1)
    expected = dense_direction(a, b, problem.mean_gradient() * (1 if mean else count), damping)
    close(problem.step_direction(Eva, damping=damping, reduction="mean" if mean else "sum"), expected)


@given(problem=problems(), damping=st.floats(1e-2, 10))
def test_preset_averages_output_gradients_of_the_mean_loss(problem: Positions, damping: float) -> None:
    x, z = problem.rows()
    a, b = x.mean((1, 2)), z.mean((1, 2)) / x.shape[1]
    expected = dense_direction(a, b, problem.mean_gradient(), damping)
    close(problem.step_direction(Eva, damping=damping, preset="eva"), expected)


@given(problem=problems(kinds=("linear",)))
def test_rank_one_of_one_sample_is_its_own_fisher_matrix(problem: Positions) -> None:
    """With one sample and one position nothing is approximated: v = (ggᵀ + γI)⁻¹ g = g/(‖g‖² + γ)."""
    one = Positions(problem.layer, problem.x[:1])
    grad = one.mean_gradient()
    close(one.step_direction(Eva, damping=0.1), grad / (grad.square().sum() + 0.1))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("preset", [None, "eva"])
def test_running_means(preset: str | None) -> None:
    model = nn.Linear(3, 2, bias=False)
    opt = Eva(model, lr=1e-3, kl_clip=None, preset=preset)
    expected: Any = None
    for k in range(1, 25):
        x = torch.randn(20, 3)
        model(x).square().sum(1).mean().backward()
        opt.step()
        opt.zero_grad()
        weight = min(1 - 1 / k, 0.95) if preset is None else 0.0 if k == 1 else 0.05
        new = x.mean(0) if preset is None else x[:16].mean(0)
        expected = new if expected is None else weight * expected + (1 - weight) * new
        close(opt._running[""]["inputs"][0], expected, 1e-12)


@pytest.mark.usefixtures("double")
def test_frequency_is_honoured() -> None:
    model = Net()
    opt = Eva(model, lr=1e-3, statistics_every=3)
    before = None
    for step in range(7):
        train(model, opt, range(step, step + 1))
        now = opt._running["inner"]["outputs"]
        assert (before is None or not torch.equal(now, before)) == (step % 3 == 0)
        before = now


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"preset": "eva", "other": "adamw"}])
def test_resume_is_bit_for_bit(seed: int, options: dict[str, Any]) -> None:
    check_resume(lambda model: Eva(model, lr=0.05, statistics_every=2, **options), seed)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_batch_leaves_the_vectors(bad: float) -> None:
    check_bad_batch(lambda model: Eva(model, lr=0.05), bad)


@pytest.mark.usefixtures("double")
def test_accumulation_has_the_vectors_of_the_joined_batch() -> None:
    check_accumulation(lambda model: Eva(model, lr=0.05))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "EVA"}, r"choose one of \[None, 'eva'\]"),
        ({"average": -0.1}, "average=-0.1; it must be at least 0"),
        ({"damping": 0.0}, "damping=0.0; it must be a number > 0"),
        ({"statistics_every": 0}, "statistics_every=0; it must be a whole number"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Eva(nn.Linear(3, 2), **options)
