"""Gauss–Newton where matrices are singular, vanish, or are rounded to float32."""

from __future__ import annotations

import copy

import pytest
import torch
from residuals import DAMPING, by_autograd, close, dense_direction, dense_rows, flat, network
from torch import Tensor, nn

from fngd import GaussNewton


@pytest.mark.parametrize("solve", ["samples", "parameters"])
def test_singular_matrix_without_damping_gives_the_least_norm(solve: str) -> None:
    net = nn.Linear(3, 1).double()
    x = torch.randn(4, 3).double()
    x = torch.cat([x, x])  # every row twice

    def closure() -> dict[str, Tensor]:
        return {"r": net(x).squeeze(1) - 1}

    opt = GaussNewton(net, damping=0.0, solve=solve)
    rows, s = dense_rows(net, closure)
    got = flat(opt.direction(closure))
    close(got, torch.linalg.pinv(rows, rtol=1e-10) @ s)
    opt.step(closure)
    assert opt.info is not None
    assert "eigenvalues" in opt.info.method or solve == "parameters"


def test_vanished_jacobian_and_vanished_residuals() -> None:
    w = nn.Parameter(torch.zeros(2).double())
    opt = GaussNewton([w], damping=0.0)
    opt.step(lambda: w**2 + 1)  # J = 0
    assert torch.equal(w.detach(), torch.zeros(2).double())
    assert opt.step(lambda: w) == 0
    assert torch.equal(w.detach(), torch.zeros(2).double())


def test_one_residual_and_one_parameter() -> None:
    w = nn.Parameter(torch.tensor([4.0]).double())
    opt = GaussNewton([w], damping=0.0)
    opt.step(lambda: 2 * w - 2)
    assert abs(w.item() - 1) < 1e-14


def test_float32_parameters_are_solved_in_float64() -> None:
    net, x = network(), torch.rand(30, 2).double()
    expected = dense_direction(*dense_rows(net, lambda: {"r": by_autograd(net, x) + 1}))
    single = copy.deepcopy(net).float()
    got = GaussNewton(single, damping=DAMPING).direction(lambda: by_autograd(single, x.float()) + 1)
    assert {part.dtype for part in got} == {torch.float32}
    assert torch.linalg.vector_norm(flat(got) - expected) < 1e-2 * torch.linalg.vector_norm(expected)
    # K is indefinite by rounding, were λ not raised to ε·tr(K)
    opt = GaussNewton(single, damping=0.0, chunk_size=9, acceleration=False)
    losses = [opt.step(lambda: by_autograd(single, x.float()) + 1) for _ in range(6)]
    assert losses[-1] < 0.5 * losses[0]


def test_float32_parameters_are_as_good_as_float64_until_residuals_are_rounded() -> None:
    """J Jᵀ and JᵀJ in float32 would drown what is soft: the direction at λ = 1e-9·tr K is right to some digits."""
    net, x = network(width=3), torch.rand(60, 2).double()
    for solve in ("samples", "parameters"):
        double, single = copy.deepcopy(net), copy.deepcopy(net).float()
        directions = []
        for each in (double, single):
            points = x.to(next(each.parameters()).dtype)
            opt = GaussNewton(each, damping=1e-9, solve=solve)
            directions.append(flat(opt.direction(lambda each=each, p=points: by_autograd(each, p) + 1)).double())
        assert torch.linalg.vector_norm(directions[1] - directions[0]) < 0.1 * torch.linalg.vector_norm(directions[0])
