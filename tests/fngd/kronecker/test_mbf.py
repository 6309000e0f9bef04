"""MBF: its direction is that of the blocks cut out of the dense Fisher matrix of per-sample gradients."""

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
from test_ekfac import per_sample
from torch import Tensor, nn

from fngd.kronecker import mbf
from fngd.kronecker.mbf import MBF


def blocks_of(problem: Positions) -> list[list[int]]:
    """Which entries of a group's flattened gradient [out, inp] are a block, by hand."""
    layer, (_, _, _, inputs) = problem.layer, problem.rows()[0].shape
    groups = getattr(layer, "groups", 1)
    outputs = layer.weight.shape[0] // groups
    if isinstance(layer, nn.Linear):
        return [list(range(o * inputs, (o + 1) * inputs)) for o in range(outputs)]
    kernel = math.prod(layer.kernel_size)
    channels = layer.weight.shape[1]
    found = []
    for o in range(outputs):
        found += [[o * inputs + c * kernel + k for k in range(kernel)] for c in range(channels)]
        found += [[o * inputs + channels * kernel]] if layer.bias is not None else []
    return found


def dense_direction(problem: Positions, damping: float, scale: float, rows: str) -> Tensor:
    result = []
    for samples, grad in zip(per_sample(problem), problem.mean_gradient() * scale, strict=True):
        own = samples.flatten(1)
        fisher = own.T @ own / len(own)
        blocks = blocks_of(problem)
        matrices = [fisher[block][:, block] for block in blocks]
        if rows == "mean" and isinstance(problem.layer, nn.Linear):
            matrices = [torch.stack(matrices).mean(0)] * len(blocks)
        direction = torch.zeros_like(own[0])
        for block, matrix in zip(blocks, matrices, strict=True):
            damped = matrix + damping * torch.eye(len(matrix)).to(matrix)
            direction[block] = torch.linalg.solve(damped, grad.flatten()[block])
        result.append(direction.view_as(grad))
    return torch.stack(result)


@given(
    problem=problems(),
    damping=st.floats(1e-2, 10),
    reduction=st.sampled_from(["mean", "sum"]),
    rows=st.sampled_from(["mean", "each"]),
)
def test_direction_is_the_dense_one(problem: Positions, damping: float, reduction: str, rows: str) -> None:
    expected = dense_direction(problem, damping, 1 if reduction == "mean" else len(problem.x), rows)
    close(problem.step_direction(MBF, damping=damping, reduction=reduction, rows=rows), expected)


@given(problem=problems(), chunk=st.integers(1, 50))
def test_chunks_of_samples_change_nothing(problem: Positions, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mbf, "CHUNK", chunk)
        parts = problem.step_direction(MBF)
    close(parts, problem.step_direction(MBF), 1e-10)


@pytest.mark.usefixtures("double")
def test_moving_average() -> None:
    model = nn.Linear(3, 2)
    opt = MBF(model, lr=0.0, average=0.6, kl_clip=None)
    expected: Any = None
    for k in range(1, 5):
        x = torch.randn(4, 3)
        rows = torch.cat([x, torch.ones(4, 1)], 1)
        z = 2 * model(x).detach()
        model(x).square().sum(1).mean().backward()
        opt.step()
        opt.zero_grad()
        new = torch.einsum("bo,bi,bj->ij", z.square(), rows, rows) / 4 / 2
        weight = min(1 - 1 / k, 0.6)
        expected = new if expected is None else weight * expected + (1 - weight) * new
        close(opt._running[""]["inputs"].view(4, 4), expected, 1e-12)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("rows", ["mean", "each"])
def test_accumulation_has_the_blocks_of_the_joined_batch(rows: str) -> None:
    check_accumulation(lambda model: MBF(model, lr=0.05, rows=rows))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", ["mean", "each"])
def test_resume_is_bit_for_bit(seed: int, rows: str) -> None:
    check_resume(lambda model: MBF(model, lr=0.05, statistics_every=2, inverse_every=3, rows=rows), seed)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_batch_leaves_the_blocks(bad: float) -> None:
    check_bad_batch(lambda model: MBF(model, lr=0.0), bad)


@pytest.mark.usefixtures("double")
def test_a_bias_that_freezes_starts_anew() -> None:
    model = Net()
    opt = MBF(model, lr=0.05, kl_clip=None)
    train(model, opt, range(2))
    model.conv.bias.requires_grad_(False)
    train(model, opt, range(2, 4))
    assert opt._method.sizes(opt._running["conv"]) == (1, 3, 18)
    model.conv.bias.requires_grad_(True)
    train(model, opt, range(4, 6))
    assert opt._method.sizes(opt._running["conv"]) == (1, 3, 19)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": "all"}, r"rows='all' is unknown; choose one of \['mean', 'each'\]"),
        ({"average": 1.0}, "average=1.0; it must be at least 0 and less than 1"),
        ({"damping": 0.0}, "damping=0.0; it must be a number > 0"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MBF(nn.Linear(3, 2), **options)
