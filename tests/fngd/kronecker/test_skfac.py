"""SKFAC: equal to dense inverses of the same factors, whatever the reduction over positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preconditioned import Net, Positions, batch, check_accumulation, check_resume, close, problems, train
from torch import Tensor, nn
from torch.nn import functional as F

from fngd.kronecker.kfac import KFAC
from fngd.kronecker.skfac import SKFAC, compact, low_rank_product, replaced, solve_rows


def dense_direction(a_columns: Tensor, g_columns: Tensor, grad: Tensor, damping: float) -> Tensor:
    """(ḠḠᵀ + √γI)⁻¹ g (ĀĀᵀ + √γI)⁻¹ by dense inverses, from rows [groups, R, features]."""
    result = []
    for x, z, grad_k in zip(a_columns, g_columns, grad, strict=True):
        a = x.T @ x + math.sqrt(damping) * torch.eye(x.shape[1]).to(x)
        g = z.T @ z + math.sqrt(damping) * torch.eye(z.shape[1]).to(x)
        result.append(torch.linalg.inv(g) @ grad_k @ torch.linalg.inv(a))
    return torch.stack(result)


@given(problem=problems(kinds=("linear", "positions")), damping=st.floats(1e-3, 10), mean=st.booleans())
def test_linear_layers_are_kfac_with_either_factor_damped(problem: Positions, damping: float, mean: bool) -> None:
    x, z = problem.rows()
    count, time = x.shape[1:3]
    a, g = x.flatten(1, 2) / math.sqrt(count), z.flatten(1, 2) / math.sqrt(count * time)
    grad = problem.mean_gradient() * (1 if mean else count)
    got = problem.step_direction(SKFAC, damping=damping, reduction="mean" if mean else "sum")
    close(got, dense_direction(a, g, grad, damping))
    # and from the factors that KFAC itself keeps
    kfac = KFAC(problem.layer, kl_clip=None, lr=0.0)
    problem.losses().mean().backward()
    kfac.step()
    kfac.remove()
    a_kfac, g_kfac = (kfac._running[""][name] for name in ("inputs", "outputs"))
    root = math.sqrt(damping)
    direction = torch.linalg.solve(g_kfac + root * torch.eye(g.shape[2]).to(g), grad)
    direction = torch.linalg.solve(a_kfac + root * torch.eye(a.shape[2]).to(a), direction.mT).mT
    close(got, direction)


@given(problem=problems(kinds=("conv",)), damping=st.floats(1e-3, 10), positions=st.sampled_from(["sum", "mean"]))
def test_reduce_sum_is_its_formula(problem: Positions, damping: float, positions: str) -> None:
    x, z = problem.rows()
    count, time = x.shape[1:3]
    scale = time if positions == "mean" else 1
    a, g = x.sum(2) / scale / math.sqrt(count), z.sum(2) / scale / math.sqrt(count)
    expected = dense_direction(a, g, problem.mean_gradient(), damping)
    close(problem.step_direction(SKFAC, damping=damping, positions=positions), expected)


@given(
    problem=problems(kinds=("conv",)), damping=st.floats(1e-3, 10), keep=st.integers(1, 6), seed=st.integers(0, 2**31)
)
def test_subsampling_is_its_formula(problem: Positions, damping: float, keep: int, seed: int) -> None:
    x, z = problem.rows()
    count, time = x.shape[1:3]
    kept = min(keep, time)
    index = torch.arange(1)
    if time > 1:
        index = torch.randperm(time, generator=torch.Generator().manual_seed(seed))[:kept]
    a = x[:, :, index].flatten(1, 2) * math.sqrt(time / kept / count)
    g = z[:, :, index].flatten(1, 2) / math.sqrt(count * kept)
    expected = dense_direction(a, g, problem.mean_gradient(), damping)
    close(problem.step_direction(SKFAC, damping=damping, positions="subsample", keep=keep, seed=seed), expected)


@given(problem=problems(kinds=("conv",)))
def test_all_positions_kept_are_kfacs_factors(problem: Positions) -> None:
    kfac = KFAC(problem.layer, kl_clip=None, lr=0.0)
    problem.losses().mean().backward()
    kfac.step()
    kfac.remove()
    skfac = SKFAC(problem.layer, kl_clip=None, lr=0.0, positions="subsample", keep=10**6)
    problem.losses().mean().backward()
    skfac.step()
    skfac.remove()
    for name in ("inputs", "outputs"):
        side = skfac._running[""][name]
        side = side if side.shape[1] == side.shape[2] else side.mT @ side
        close(side, kfac._running[""][name])


@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    good=st.booleans(),
    features=st.integers(1, 6),
)
def test_replacing_keeps_the_product_whatever_the_shapes(
    seed: int, sizes: tuple[int, int], good: bool, features: int
) -> None:
    torch.manual_seed(seed)
    old, new = (torch.randn(2, size, features, dtype=torch.float64) for size in sizes)
    side = replaced(compact(old), compact(new), torch.tensor(good))
    moment = side if side.shape[1] == side.shape[2] else side.mT @ side
    expected = new if good else old
    close(moment, expected.mT @ expected, 1e-12)


def test_low_rank_product_needs_float64_only_inside() -> None:
    torch.manual_seed(0)
    rows, matrix = torch.randn(1, 5, 40), torch.randn(1, 3, 40)
    dense = matrix.double() @ torch.linalg.inv((rows.mT @ rows).double() + 1e-3 * torch.eye(40))
    got = low_rank_product(matrix, rows, solve_rows(rows, 1e-3), 1e-3)
    assert got.dtype == torch.float32
    close(got.double(), dense, 1e-3)  # of what is left of M when all but 1e-3 of it has been taken off


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("positions", ["sum", "subsample"])
def test_resume_is_bit_for_bit(seed: int, positions: str) -> None:
    check_resume(lambda model: SKFAC(model, lr=0.05, every=2, positions=positions), seed)


def test_subsampling_repeats_with_its_seed() -> None:
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        train(model := Net(), SKFAC(model, lr=0.05, positions="subsample", seed=seed), range(3))
        results.append(model.conv.weight.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("size", [3, 5, 9])
def test_bad_batch_leaves_the_factors(size: int) -> None:
    model = Net()
    opt = SKFAC(model, lr=0.05)
    train(model, opt, range(1, 3))

    def products() -> dict[str, Tensor]:
        grad = {layer: torch.ones_like(state["inputs"][:, :1]) for layer, state in opt._running.items()}
        return {
            layer: low_rank_product(grad[layer], state["inputs"], solve_rows(state["inputs"], 0.1), 0.1)
            for layer, state in opt._running.items()
        }

    before = products()
    x, y = batch(3, size)
    x[0, 0, 0, 0] = math.nan
    F.cross_entropy(model(x), y).backward()
    opt.step()
    for layer, product in products().items():
        torch.testing.assert_close(product, before[layer], msg=layer)


@pytest.mark.usefixtures("double")
def test_frequency_and_scheduled_damping() -> None:
    model = Net()
    opt = SKFAC(model, lr=1e-3, every=3)
    changed, before = [], None
    for step in range(7):
        opt.param_groups[0]["damping"] = 0.03 * 0.87**step
        train(model, opt, range(step, step + 1))
        now = opt._inverses["inner"]["damping"].item()
        changed.append(before is None or now != before)
        assert changed[-1] == (step % 3 == 0)
        before = now
    assert before == pytest.approx(math.sqrt(0.03 * 0.87**6))


@pytest.mark.usefixtures("double")
def test_accumulation_has_the_factors_of_the_joined_batch() -> None:
    check_accumulation(lambda model: SKFAC(model, lr=0.05))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "max"}, r"choose one of \['sum', 'mean', 'subsample'\]"),
        ({"keep": 0}, "keep=0; it must be a whole number of at least 1"),
        ({"every": 0}, "every=0; it must be"),
        ({"damping": -1.0}, "damping=-1.0; it must be a number > 0"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SKFAC(nn.Linear(3, 2), **options)
