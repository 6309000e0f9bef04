"""Shampoo: its direction is the dense Kronecker product of inverse roots; blocks, grafting, resume, NaN."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preconditioned import Net, batch, check_resume, close, train
from torch import Tensor, nn
from torch.nn import functional as F

from fngd.shampoo import Shampoo, block_slices, inverse_root, merged_shape

EPSILON = 1e-3  # large, so that the root of a rank-deficient matrix is well conditioned in these tests


def dense_root(moment: Tensor, root: int) -> Tensor:
    """(L + ελ_max I)^(−1/root), by inverting and taking square roots again and again (root is a power of two)."""
    values = torch.linalg.eigvalsh(moment)
    result = torch.linalg.inv(moment + EPSILON * values[-1] * torch.eye(len(moment)).to(moment))
    while root > 1:
        values, vectors = torch.linalg.eigh(result)
        result, root = vectors @ torch.diag(values.sqrt()) @ vectors.T, root // 2
    return result


def dense_direction(grads: list[Tensor]) -> Tensor:
    """(⊗_i L_i^(−1/2k)) vec(g) for the last gradient, L_i from all."""
    grad = grads[-1]
    k = grad.dim()
    roots = []
    for axis in range(k):
        rows = [g.movedim(axis, 0).flatten(1) for g in grads]
        moment = sum(row @ row.T for row in rows)
        if k == 3:  # 2k = 6 is no power of two
            values, vectors = torch.linalg.eigh(moment)
            values = (values + EPSILON * values[-1]) ** (-1 / 6)
            roots.append(vectors @ torch.diag(values) @ vectors.T)
        else:
            roots.append(dense_root(moment, 2 * k))
    return (reduce(torch.kron, roots) @ grad.flatten()).view_as(grad)


shapes = st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple)


def steps(param: nn.Parameter, grads: list[Tensor], **options: Any) -> list[Tensor]:
    """What each step of size 1 subtracts."""
    opt = Shampoo([param], lr=1.0, momentum=0.0, epsilon=EPSILON, **options)
    result = []
    for grad in grads:
        before = param.detach().clone()
        param.grad = grad.clone()
        opt.step()
        result.append(before - param.detach())
    return result


@given(shape=shapes, seed=st.integers(0, 10**6), graft=st.booleans())
def test_direction_is_the_dense_one(shape: tuple[int, ...], seed: int, graft: bool) -> None:
    torch.manual_seed(seed)
    grads = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    got = steps(nn.Parameter(torch.zeros_like(grads[0])), grads, statistics_every=1, inverse_every=1, graft=graft)
    for number in range(3):
        expected = dense_direction(grads[: number + 1])
        close(got[number], expected * grads[number].norm() / expected.norm() if graft else expected)


@given(shape=shapes, block=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_blocks_are_parameters_of_their_own(shape: tuple[int, ...], block: int, seed: int) -> None:
    torch.manual_seed(seed)
    grad = torch.randn(shape, dtype=torch.float64)
    [got] = steps(nn.Parameter(torch.zeros_like(grad)), [grad], block=block, graft=False)
    covered = torch.zeros_like(grad)
    for where in block_slices(shape, block):
        assert all(size <= block for size in grad[where].shape)
        covered[where] += 1
        close(got[where], dense_direction([grad[where]]))
    assert (covered == 1).all()


def test_merged_shapes() -> None:
    assert merged_shape((512, 256, 3, 3), 128) == (512, 256, 9)
    assert merged_shape((3, 4), 128) == (12,)
    assert merged_shape((1, 1), 128) == ()
    model = nn.Conv2d(16, 64, 3)
    opt = Shampoo(model.parameters(), preset="shampoo-pytorch")
    model(torch.randn(2, 16, 4, 4)).square().sum().backward()
    opt.step()
    assert [moment.shape[0] for moment in opt._moments[model.weight][0]] == [64, 48, 3]


@pytest.mark.usefixtures("double")
def test_vectors_and_groups_without_take_the_plain_gradient() -> None:
    model, clean = Net(), Net()
    clean.load_state_dict(model.state_dict())
    vectors = {name for name, p in model.named_parameters() if p.dim() < 2}
    opt = Shampoo(
        [
            {"params": [p for name, p in model.named_parameters() if not name.startswith("inner")]},
            {"params": model.inner.parameters(), "precondition": False},
        ],
        lr=0.1,
    )
    sgd = torch.optim.SGD(clean.parameters(), lr=0.1, momentum=0.9)
    train(model, opt, range(1))
    train(clean, sgd, range(1))
    for name, value in clean.state_dict().items():
        same = torch.equal(value, model.state_dict()[name])
        assert same == (name in vectors or name.startswith("inner")), name


@pytest.mark.usefixtures("double")
def test_frequencies_are_honoured() -> None:
    model = Net()
    opt = Shampoo(model.parameters(), lr=1e-3, statistics_every=2, inverse_every=3)
    before: Any = (None, None)
    for step in range(8):
        train(model, opt, range(step, step + 1))
        now = (opt._moments[model.inner.weight][0][0], opt._roots[model.inner.weight][0][0])
        for every, old, new in zip((2, 3), before, now, strict=True):
            assert (old is None or not torch.equal(old, new)) == (step % every == 0)
        before = now


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"block": 2}, {"preset": "shampoo-pytorch", "decay": 0.9, "block": 4}])
def test_resume_is_bit_for_bit(seed: int, options: dict[str, Any]) -> None:
    def make(model: nn.Module) -> Shampoo:
        return Shampoo(model.parameters(), lr=0.05, statistics_every=2, inverse_every=3, **options)

    check_resume(make, seed)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_gradient_leaves_the_statistics(bad: float) -> None:
    model = Net()
    opt = Shampoo(model.parameters(), lr=0.05, statistics_every=1, inverse_every=1)
    train(model, opt, range(2))
    before = {param: [list(block) for block in blocks] for param, blocks in opt._moments.items()}
    x, y = batch(3)
    x[0, 0, 0, 0] = bad
    F.cross_entropy(model(x), y).backward()
    for p in model.parameters():
        p.grad.fill_(bad)
    opt.step()
    for param, blocks in before.items():
        for old, new in zip(blocks, opt._moments[param], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


@pytest.mark.usefixtures("double")
def test_decay_and_grafted_length() -> None:
    param = nn.Parameter(torch.zeros(3, 4))
    grads = [torch.randn(3, 4) for _ in range(4)]
    opt = Shampoo([param], lr=1.0, momentum=0.0, decay=0.7, statistics_every=1, inverse_every=1)
    expected = torch.zeros(3, 3)
    for number, grad in enumerate(grads):
        before = param.detach().clone()
        param.grad = grad
        opt.step()
        expected = grad @ grad.T if number == 0 else 0.7 * expected + 0.3 * grad @ grad.T
        close(opt._moments[param][0][0], expected, 1e-12)
        assert (before - param).norm().item() == pytest.approx(grad.norm().item())


def test_zero_gradient_makes_no_step() -> None:
    param = nn.Parameter(torch.ones(3, 4))
    opt = Shampoo([param], lr=1.0)
    param.grad = torch.zeros(3, 4)
    opt.step()
    assert torch.equal(param, torch.ones(3, 4))
    assert torch.equal(inverse_root(torch.zeros(2, 2), 4, 1e-12), torch.eye(2))


def test_half_precision_is_computed_in_float32() -> None:
    param = nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    opt = Shampoo([param], lr=0.1)
    param.grad = torch.randn(3, 4).bfloat16()
    opt.step()
    assert opt._moments[param][0][0].dtype == torch.float32
    assert param.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block=0; it must be a whole number of at least 1"),
        ({"epsilon": 0.0}, "epsilon=0.0; it must be a number > 0"),
        ({"decay": 0.0}, "decay=0.0; it must be greater than 0"),
        ({"decay": math.nan}, "decay=nan"),
        ({"preset": "google"}, r"choose one of \[None, 'shampoo-pytorch'\]"),
        ({"inverse_every": 0}, "inverse_every=0"),
        ({"lr": -1.0}, "lr=-1.0; it must be at least 0"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shampoo(nn.Linear(3, 2).parameters(), **options)


def test_foreign_states_are_refused() -> None:
    def trained(size: int, block: int = 128) -> Shampoo:
        model = nn.Linear(size, 2)
        opt = Shampoo(model.parameters(), block=block)
        model(torch.randn(2, size)).sum().backward()
        opt.step()
        return opt

    with pytest.raises(ValueError, match="do not fit its shape"):
        trained(3).load_state_dict(trained(4).state_dict())
    with pytest.raises(ValueError, match="Construct the optimiser as the saved one was"):
        trained(4, block=2).load_state_dict(trained(4).state_dict())
    with pytest.raises(ValueError, match="this optimiser is Shampoo"):
        trained(3).load_state_dict({"state": {}, "param_groups": []})
