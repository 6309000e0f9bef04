"""KFAC: its direction is that of A ⊗ G built and inverted densely, of averages as often as asked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preconditioned import Net, Positions, batch, close, problems, train
from torch import Tensor, nn
from torch.nn import functional as F

from fngd.kronecker.kfac import KFAC, damped_inverse, symmetric_eigen


def factors(problem: Positions) -> tuple[Tensor, Tensor]:
    """A and G, group by group, summed over samples and positions one at a time."""
    x, z = problem.rows()
    groups, count, time, _ = x.shape
    a, g = torch.zeros(groups, x.shape[3], x.shape[3]).to(x), torch.zeros(groups, z.shape[3], z.shape[3]).to(x)
    for group in range(groups):
        for b in range(count):
            for t in range(time):
                a[group] += torch.outer(x[group, b, t], x[group, b, t]) / count
                g[group] += torch.outer(z[group, b, t], z[group, b, t]) / (count * time)
    return a, g


def dense_direction(a: Tensor, g: Tensor, grad: Tensor, damping: float) -> Tensor:
    """(G ⊗ A + γI)⁻¹ vec(g), each group by the dense inverse."""
    result = []
    for a_k, g_k, grad_k in zip(a, g, grad, strict=True):
        fisher = torch.kron(g_k, a_k)
        eye = torch.eye(len(fisher)).to(fisher)
        result.append(torch.linalg.solve(fisher + damping * eye, grad_k.flatten()).view_as(grad_k))
    return torch.stack(result)


@given(problem=problems(), damping=st.floats(1e-2, 10), reduction=st.sampled_from(["mean", "sum"]))
def test_direction_is_the_dense_one(problem: Positions, damping: float, reduction: str) -> None:
    a, g = factors(problem)
    scale = 1 if reduction == "mean" else len(problem.x)
    expected = dense_direction(a, g, problem.mean_gradient() * scale, damping)
    close(problem.step_direction(KFAC, damping=damping, reduction=reduction), expected)


@given(problem=problems(), damping=st.floats(1e-2, 10))
def test_cholesky_with_pi_is_the_dense_one(problem: Positions, damping: float) -> None:
    a, g = factors(problem)
    expected = []
    for a_k, g_k, grad in zip(a, g, problem.mean_gradient(), strict=True):
        mean_a, mean_g = a_k.trace() / len(a_k), g_k.trace() / len(g_k)
        pi = (mean_a / mean_g).sqrt() if mean_a > 0 and mean_g > 0 else 1.0
        damped_a = a_k + pi * math.sqrt(damping) * torch.eye(len(a_k)).to(a_k)
        damped_g = g_k + math.sqrt(damping) / pi * torch.eye(len(g_k)).to(a_k)
        expected.append(torch.linalg.inv(damped_g) @ grad @ torch.linalg.inv(damped_a))
    close(problem.step_direction(KFAC, damping=damping, inverse="cholesky"), torch.stack(expected))


@given(problem=problems(), damping=st.floats(1e-4, 1))
def test_preset_is_what_the_public_code_computes(problem: Positions, damping: float) -> None:
    x, z = problem.rows()
    count, time = x.shape[1:3]
    spatial = 1 if isinstance(problem.layer, nn.Linear) else time
    x, z = x.flatten(1, 2) / spatial, z.flatten(1, 2) / count / spatial
    eye_a, eye_g = torch.eye(x.shape[2]).to(x), torch.eye(z.shape[2]).to(x)
    a = 0.95 * eye_a + 0.05 * x.mT @ x / (count * time)
    g = 0.95 * eye_g + 0.05 * z.mT @ z / (count * time)
    expected = dense_direction(a, g, problem.mean_gradient(), damping)
    close(problem.step_direction(KFAC, damping=damping, preset="kfac-pytorch"), expected)


@given(problem=problems())
def test_heavy_damping_is_the_plain_gradient(problem: Positions) -> None:
    close(problem.step_direction(KFAC, damping=1e12, lr=1e12), problem.mean_gradient())


@pytest.mark.usefixtures("double")
def test_layer_called_twice_has_one_pair_of_factors() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)[..., ::2])

    model, x = Twice(), torch.randn(5, 2, 6)
    opt = KFAC(model)
    model(x).square().flatten(1).sum(1).mean().backward()
    opt.step()
    middle = (model.conv(x)[..., ::2]).detach()
    assert opt._running["conv"]["inputs"][0, -1, -1] == 6 + 3, "1 · 1 at every position of both calls"
    assert middle.shape[-1] == 3


@pytest.mark.usefixtures("double")
def test_moving_average() -> None:
    model = nn.Linear(3, 2)
    opt = KFAC(model, lr=1e-3, average=0.6, kl_clip=None)
    expected: Any = None
    for k in range(1, 6):
        x = torch.randn(4, 3)
        rows = torch.cat([x, torch.ones(4, 1)], 1)
        model(x).square().sum(1).mean().backward()
        opt.step()
        opt.zero_grad()
        weight = min(1 - 1 / k, 0.6)
        new = rows.T @ rows / 4
        expected = new if expected is None else weight * expected + (1 - weight) * new
        close(opt._running[""]["inputs"][0], expected, 1e-12)


@pytest.mark.usefixtures("double")
def test_frequencies_are_honoured() -> None:
    model = Net()
    opt = KFAC(model, lr=1e-3, statistics_every=2, inverse_every=3)
    factors_changed, inverses_changed = [], []
    before: Any = (None, None)
    for step in range(12):
        train(model, opt, range(step, step + 1))
        now = (opt._running["inner"]["inputs"], opt._inverses["inner"]["q_a"])
        for changed, old, new in zip((factors_changed, inverses_changed), before, now, strict=True):
            changed.append(old is None or not torch.equal(old, new))
        before = now
    assert factors_changed == [step % 2 == 0 for step in range(12)]
    assert inverses_changed == [step % 3 == 0 for step in range(12)]


def test_gradients_are_not_touched() -> None:
    model = Net()
    opt = KFAC(model, lr=0.1)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    before = [p.grad.clone() for p in model.parameters()]
    opt.step()
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))


def test_eigen_falls_back_to_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.eigh

    def fails_in_single(matrix: Tensor) -> Any:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_single)
    values, vectors = symmetric_eigen(torch.diag(torch.tensor([1.0, 2.0])))
    assert values.dtype == vectors.dtype == torch.float32
    assert values.tolist() == [1.0, 2.0]


def test_indefinite_matrix_falls_back_to_the_damping() -> None:
    matrix = torch.tensor([[0.0, 5.0], [5.0, 0.0]])
    torch.testing.assert_close(damped_inverse(matrix, 0.5), 2 * torch.eye(2))
