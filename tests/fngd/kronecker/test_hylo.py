"""HyLo: its direction is that of the dense low-rank matrix of the samples that it keeps, however it has chosen them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preconditioned import (
    Positions,
    check_accumulation,
    check_bad_batch,
    check_resume,
    close,
    problems,
)
from test_ekfac import per_sample
from torch import Tensor, nn

from fngd import HyLo
from fngd.kronecker.hylo import hylo
from fngd.kronecker.hylo.hylo import interpolated, pivots, sample_gram


def columns(problem: Positions) -> Tensor:
    """U [parameters, N], all groups together, as the mean gradient is flattened."""
    return per_sample(problem).transpose(0, 1).flatten(1).T


def solved(matrix: Tensor, problem: Positions, damping: float, scale: float = 1.0) -> Tensor:
    grad = problem.mean_gradient() * scale
    damped = matrix + damping * torch.eye(len(matrix)).to(matrix)
    return torch.linalg.solve(damped, grad.flatten()).view_as(grad)


def greedy(u: Tensor, count: int) -> list[int]:
    """Column-pivoted Gram–Schmidt on the gradients themselves; ends where nothing is left."""
    left, chosen = u.clone(), []
    for _ in range(count):
        lengths = left.norm(dim=0)
        best = int(lengths.argmax())
        if lengths[best] <= 1e-9 * u.norm():
            break
        chosen.append(best)
        unit = left[:, best : best + 1] / lengths[best]
        left = left - unit @ (unit.T @ left)
    return chosen


@given(problem=problems(), damping=st.floats(1e-2, 10), rank=st.floats(0.05, 1.0), mean=st.booleans())
def test_interpolation_is_the_dense_one(problem: Positions, damping: float, rank: float, mean: bool) -> None:
    u = columns(problem)
    count = max(1, round(rank * u.shape[1]))
    chosen = greedy(u, count)
    kept = u[:, chosen]
    share = torch.linalg.lstsq(kept, u).solution if chosen else u.new_zeros(0, u.shape[1])  # U ≈ U_S Pᵀ
    near = kept @ share
    expected = solved(near @ near.T / u.shape[1], problem, damping, 1 if mean else u.shape[1])
    options: Any = {"rank": rank, "select": "interpolate", "damping": damping}
    close(problem.step_direction(HyLo, reduction="mean" if mean else "sum", **options), expected, 1e-7)


@given(problem=problems(), damping=st.floats(1e-2, 10))
def test_all_samples_are_natural_gradient(problem: Positions, damping: float) -> None:
    u = columns(problem)
    expected = solved(u @ u.T / u.shape[1], problem, damping)
    close(problem.step_direction(HyLo, rank=1.0, select="interpolate", damping=damping), expected)


@given(problem=problems(), damping=st.floats(1e-2, 10), rank=st.floats(0.05, 1.0), seed=st.integers(0, 2**31))
def test_sampling_is_the_dense_one(problem: Positions, damping: float, rank: float, seed: int) -> None:
    u = columns(problem)
    count, chances = max(1, round(rank * u.shape[1])), u.square().sum(0)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(chances, count, replacement=True, generator=generator)
    near = sum(torch.outer(u[:, b], u[:, b]) / (count * chances[b] / chances.sum()) for b in chosen)
    options: Any = {"rank": rank, "select": "sample", "seed": seed, "damping": damping}
    close(problem.step_direction(HyLo, **options), solved(near / u.shape[1], problem, damping))


def test_sampling_is_right_on_average() -> None:
    """The mean of U_S W U_Sᵀ over many draws is UUᵀ."""
    torch.manual_seed(0)
    u, total = torch.randn(4, 6, dtype=torch.float64) * torch.arange(1, 7), torch.zeros(4, 4, dtype=torch.float64)
    x, z = u.T.reshape(6, 1, 4, 1), torch.ones(6, 1, 1, 1, dtype=torch.float64)
    random, draws = torch.Generator().manual_seed(1), 4000
    for _ in range(draws):
        found = hylo.KeptSamples(0.5, "sample").collect([(x, z)], bias=False, convolution=False, random=random)
        kept = found.inputs[0, :, 0].T @ found.weights
        total += kept @ kept.T / draws
    close(total, u @ u.T, 0.05)


@given(seed=st.integers(0, 10**6), count=st.integers(1, 5), size=st.integers(5, 8))
def test_interpolation_keeps_what_it_has_chosen(seed: int, count: int, size: int) -> None:
    torch.manual_seed(seed)
    u = torch.randn(9, size, dtype=torch.float64)
    gram = u.T @ u
    chosen = pivots(gram, count)
    assert chosen.tolist() == greedy(u, count)
    root = interpolated(gram, chosen)
    share = gram[:, chosen] @ torch.linalg.inv(gram[chosen][:, chosen])
    close(root @ root.T, share.T @ share)
    close(share[chosen], torch.eye(count, dtype=torch.float64))


@given(problem=problems(), chunk=st.integers(1, 40))
def test_gram_matrix_is_that_of_the_samples(problem: Positions, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hylo, "CHUNK", chunk)
        x, z = problem.rows()
        u = columns(problem)
        close(sample_gram(x, z), u.T @ u)


@pytest.mark.usefixtures("double")
def test_accumulation_has_all_samples_of_the_joined_batch() -> None:
    check_accumulation(lambda model: HyLo(model, lr=0.05, rank=1.0, select="interpolate"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("select", ["switch", "interpolate", "sample"])
def test_resume_is_bit_for_bit(seed: int, select: str) -> None:
    check_resume(lambda model: HyLo(model, lr=0.02, rank=0.5, select=select, steps_per_epoch=3, every=2), seed)


def test_epochs_switch_by_the_gradients_change() -> None:
    """By hand: lengths of summed gradients, a threshold, and a learning rate that is halved."""
    model = nn.Linear(2, 1, bias=False)
    opt = HyLo(model, lr=0.1, momentum=0.0, steps_per_epoch=2, threshold=0.5, every=1, kl_clip=None)
    seen = []
    lengths = [1.0, 1.0, 1.2, 3.0, 3.1, 3.1, 3.1]
    for epoch, length in enumerate(lengths):
        if epoch == 5:
            opt.param_groups[0]["lr"] = 0.05
        for _ in range(2):
            seen.append(opt._method.select)
            opt.zero_grad()
            model(torch.randn(4, 2)).square().mean().backward()
            model.weight.grad = torch.tensor([[length / 2, 0.0]])
            opt.step()
    epochs = [seen[2 * epoch] for epoch in range(len(lengths))]
    assert seen[::2] == seen[1::2]
    short = {"interpolate": "i", "sample": "s"}
    # Nothing to compare with before epoch 2; 1 → 1 and 1 → 1.2 are alike, 1.2 → 3 is not; a rate is halved in epoch 5.
    assert "".join(short[each] for each in epochs) == "iissisi"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_batch_leaves_the_samples(bad: float) -> None:
    check_bad_batch(lambda model: HyLo(model, lr=0.0, rank=0.5, select="interpolate", every=1), bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "best"}, r"choose one of \['switch', 'interpolate', 'sample'\]"),
        ({}, r"give steps_per_epoch=len\(loader\), or another select="),
        ({"rank": 0.0}, "rank=0.0; it must be greater than 0 and at most 1"),
        ({"rank": 1.5}, "rank=1.5; it must be greater than 0 and at most 1"),
        ({"threshold": -1.0}, "threshold=-1.0; it must be at least 0"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HyLo(nn.Linear(3, 2), **options)
