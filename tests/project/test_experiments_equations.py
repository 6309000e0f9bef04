"""The equations of `experiments.equations` are those they claim to be, their references right, the rivals correct."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from experiments import equations
from experiments.equations_problems import PROBLEMS, Posed
from experiments.equations_reference import Table, allen_cahn, korteweg_de_vries, march
from experiments.equations_report import judge_bar, judge_seeds
from experiments.jets import Field, network
from experiments.pinn_problems import cole_hopf
from experiments.record import Context, Record
from experiments.rivals import SelfScaledBroyden, Soap, rival, updated
from fngd import GaussNewton
from fngd.demo.poisson import Problem

SMOKE = equations.SMOKE
RATE = 20.0 - math.sqrt(400 + 4 * math.pi**2)


def nested(function: Callable[[Tensor], Tensor], points: Tensor, orders: tuple[int, ...]) -> Tensor:
    x = points.clone().requires_grad_()
    value = function(x)
    parts = [value]
    for axis, order in enumerate(orders):
        last = value
        for _ in range(order):
            columns = [torch.autograd.grad(v.sum(), x, create_graph=True)[0][:, axis] for v in last.unbind(1)]
            last = torch.stack(columns, 1)
            parts.append(last)
    return torch.stack(parts, 1)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(1, 2))
def test_jets_are_nested_derivatives(seed: int, orders: list[int], outputs: int) -> None:
    torch.manual_seed(seed)
    net, inputs = network(2, (5, 4), outputs), len(orders)
    field = Field(
        net,
        tuple(orders),
        features=lambda p: torch.stack([p.sum(1).sin(), p[:, 0] ** 2], 1),
        envelope=lambda p: (1 - p**2).prod(1, keepdim=True),
        offset=lambda p: p.exp().sum(1, keepdim=True),
    )
    points = torch.rand(6, inputs).double()

    def whole(p: Tensor) -> Tensor:
        features = torch.stack([p.sum(1).sin(), p[:, 0] ** 2], 1)
        return p.exp().sum(1, keepdim=True) + (1 - p**2).prod(1, keepdim=True) * net(features)

    torch.testing.assert_close(field(field.prepare(points)), nested(whole, points, tuple(orders)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(field.values(points), whole(points))


def test_more_than_three_derivatives_are_refused() -> None:
    with pytest.raises(ValueError, match="up to 3"):
        Field(network(1, (3,)), (4,)).prepare(torch.rand(2, 1).double())


EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "burgers": lambda p: cole_hopf(p, 0.01 / math.pi).unsqueeze(1),
    "helmholtz": lambda p: torch.sin(math.pi * p[:, :1]) * torch.sin(4 * math.pi * p[:, 1:]),
    "advection": lambda p: torch.sin(p[:, 1:] - 30 * p[:, :1]),
    "kovasznay": lambda p: torch.stack(
        [
            1 - torch.exp(RATE * p[:, 0]) * torch.cos(2 * math.pi * p[:, 1]),
            RATE / (2 * math.pi) * torch.exp(RATE * p[:, 0]) * torch.sin(2 * math.pi * p[:, 1]),
            (1 - torch.exp(2 * RATE * p[:, 0])) / 2,
        ],
        1,
    ),
    "inverse": lambda p: cole_hopf(p, 0.01 / math.pi).unsqueeze(1),
    "poisson5": lambda p: torch.cos(math.pi * p).sum(1, keepdim=True),
    "poisson10": lambda p: torch.cos(math.pi * p).sum(1, keepdim=True),
}


class Exact(Field):
    """A field that is the solution, whatever its network."""

    name = ""

    def __call__(self, at: Any, orders: tuple[int, ...] | None = None) -> Tensor:
        return nested(EXACT[self.name], at.points, orders or self.orders)


@pytest.mark.parametrize("name", EXACT)
def test_exact_solutions_have_no_residual(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SMOKE["problems"][name]
    problem = PROBLEMS[name](0, settings)
    assert problem.error() > 1e-2
    assert problem.loss() > 1e-5
    monkeypatch.setattr("experiments.equations_problems.Field", type(name, (Exact,), {"name": name}))
    problem = PROBLEMS[name](0, settings)
    if name == "inverse":
        problem.net.coefficients.data = torch.tensor([1.0, 1 / math.pi], dtype=torch.float64)
    for group, residuals in problem.residuals().items():
        noise = 0.2 if group == "data" else 2e-5  # Cole and Hopf's quadrature, differentiated twice
        assert residuals.abs().max() < noise, group
    assert problem.error() < 1e-12


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("burgers", lambda u, s: (u(0.0, s) + torch.sin(math.pi * s)).abs() + u(s.abs(), 1.0).abs()),
        ("allen-cahn", lambda u, s: u(0.3, s) - u(0.3, -s)),
        ("allen-cahn", lambda u, s: u(0.3, s) - u(0.3, s + 2)),
        ("kdv", lambda u, s: (u(0.0, s) - torch.cos(math.pi * s)).abs() + (u(0.3, s) - u(0.3, s + 2)).abs()),
        ("helmholtz", lambda u, s: u(s, 1.0).abs() + u(-1.0, s).abs()),
        ("advection", lambda u, s: (u(0.0, s) - s.sin()).abs() + (u(0.3, s) - u(0.3, s + 2 * math.pi)).abs()),
    ],
)
def test_hard_constraints_are_held(name: str, held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("experiments.equations_problems.Field", lambda *a, **k: made.append(Field(*a, **k)) or made[-1])
    PROBLEMS[name](1, SMOKE["problems"][name])
    s = torch.linspace(-0.9, 0.8, 7).double()

    def u(first: Any, second: Any) -> Tensor:
        columns = [torch.as_tensor(each).double().expand(7) for each in (first, second)]
        return made[0].values(torch.stack(columns, 1)).detach().squeeze(1)

    assert held(u, s).abs().max() < 1e-12
    assert u(0.5, s).std() > 1e-3


def apart(coarse: Table, fine: Table) -> float:
    every = len(fine.places) // len(coarse.places)
    difference = coarse.values - fine.values[:, ::every]
    return float(np.linalg.norm(difference) / np.linalg.norm(fine.values))


def test_references_stand_refinement() -> None:
    """The smooth one converges at once; that with a kink at t = 0 as a kink does, and far below the bar of 5e-6."""
    assert apart(korteweg_de_vries(256, 2000, 20), korteweg_de_vries(512, 4000, 20)) < 5e-7
    coarse, fine = allen_cahn(1024, 500, 20), allen_cahn(2048, 1000, 20)
    assert apart(coarse, fine) < 5e-6
    assert apart(fine, allen_cahn(4096, 1000, 20)) < 0.4 * apart(coarse, fine)


def test_the_solver_is_of_order_four() -> None:
    """u_t = −u + u² has u = 1/(1 + e^t) from ½; a constant is one mode."""
    errors = []
    for steps in (10, 20):
        values = march(np.full(4, 0.5), -np.ones(3) + 0j, lambda v: np.fft.rfft(np.fft.irfft(v, 4) ** 2), 1.0, steps, 1)
        errors.append(abs(values[-1, 0] - 1 / (1 + math.e)))
    assert 14 < errors[0] / errors[1] < 18


@pytest.mark.parametrize("name", PROBLEMS)
def test_gauss_newton_reads_their_rows(name: str) -> None:
    """The direction is the one of rows by a backward pass each; points drawn anew are others."""
    problem = PROBLEMS[name](0, SMOKE["problems"][name])
    assert isinstance(problem, Posed)
    before = problem.loss().item()
    problem.draw()
    assert problem.loss().item() != before
    params = list(problem.net.parameters())
    rows, values = [], []
    for group, residuals in problem.residuals().items():
        scale = math.sqrt(problem.weights.get(group, 1.0) / len(residuals))
        for value in scale * residuals:
            grads = torch.autograd.grad(value, params, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([g.reshape(-1) for g in grads]))
            values.append(value.detach())
    J, s = torch.stack(rows), torch.stack(values)
    wanted = torch.linalg.solve(J.T @ J + 1e-2 * torch.eye(J.shape[1]).double(), J.T @ s)
    found = GaussNewton(problem.net, weights=problem.weights, damping=1e-2).direction(problem.residuals)
    found_ = torch.cat([part.reshape(-1) for part in found])
    assert torch.linalg.vector_norm(found_ - wanted) <= 1e-9 * torch.linalg.vector_norm(wanted)


def test_networks_are_no_larger_than_the_published() -> None:
    for name, options in equations.SMALL["problems"].items():
        problem = PROBLEMS[name](0, {**options, "points": 10})
        assert sum(p.numel() for p in problem.net.parameters()) <= 2100, name


def quadratic() -> Problem:
    torch.manual_seed(0)
    net = nn.Linear(6, 1).double()
    x = torch.randn(40, 6).double() * torch.logspace(-2, 0, 6).double()
    return Problem(net, lambda: {"r": net(x).squeeze(1) - x.sum(1)}, lambda: 0.0)


def test_self_scaled_broyden_solves_a_quadratic() -> None:
    problem = quadratic()
    method = SelfScaledBroyden(problem)
    for _ in range(60):
        method()
    assert problem.loss() < 1e-20


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_updates_satisfy_the_secant_equation_and_stay_definite(seed: int, first: bool) -> None:
    torch.manual_seed(seed)
    root = torch.randn(5, 5).double()
    H = root @ root.T + 0.1 * torch.eye(5).double()
    g, y = torch.randn(5).double(), torch.randn(5).double()
    H = torch.eye(5).double() if first else H
    s = -0.3 * H @ g
    y = y if y @ s > 0 else -y
    new = updated(None if first else H, s, y, 0.3, g)
    torch.testing.assert_close(new @ y, s)
    assert torch.linalg.eigvalsh((new + new.T) / 2).min() > 0


def test_soap_is_adam_where_the_bases_are_axes() -> None:
    """A bias is a matrix of one row: with one entry its bases are 1, and SOAP's step is Adam's."""
    ours, theirs = (nn.Parameter(torch.tensor([2.0]).double()) for _ in range(2))
    soap, adam = Soap([ours], 0.1), torch.optim.Adam([theirs], 0.1, betas=(0.95, 0.95), eps=1e-12)
    for number in range(30):
        for p, opt in ((ours, soap), (theirs, adam)):
            opt.zero_grad()
            (p**4 + number * p).sum().backward()
            opt.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["adam", "soap", "lbfgs", "ssbroyden"])
def test_rivals_lower_the_loss_and_go_on_at_new_points(kind: str) -> None:
    problem = PROBLEMS["helmholtz"](0, {"hidden": [8], "points": 60})
    method, before = rival(kind, problem, lambda: 0.01), problem.loss().item()
    for number in range(12):
        method()
        if number == 5:
            problem.draw()
            method.redrawn()
    assert problem.loss().item() < before


def test_runs_and_reports(tmp_path: Path) -> None:
    settings = {
        **SMOKE,
        "problems": {name: SMOKE["problems"][name] for name in ("helmholtz", "poisson5")},
        "budget": {"helmholtz": 0.2, "poisson5": 0.2},
    }
    record = Record("equations", "smoke", "cpu", settings)
    for unit in equations.units(settings):
        result = equations.run(unit, settings, Context("cpu", None, tmp_path / "checkpoint"))
        assert math.isfinite(result["final"])
        record.units[unit] = {"result": result}
    text = equations.EXPERIMENT.report(record)
    assert "| ssbroyden | 1 |" in text
    assert "Helmholtz" in text
    written = equations.EXPERIMENT.draw(record, tmp_path / "equations")
    assert [path.name for path in written] == ["equations-error.png", "equations-solution.png"]


def made_up(ours: list[float], other: float) -> Any:
    names = ["burgers", "helmholtz"]
    record = Record("equations", "full", "cpu", {
        **equations.FULL, "problems": {name: {} for name in names}, "methods": ["gauss-newton", "lbfgs"],
    })  # fmt: skip
    for name in names:
        for method in ("gauss-newton", "lbfgs"):
            for seed, value in enumerate(ours):
                error = value if method == "gauss-newton" else other
                result = {"error": [1.0, error], "loss": [1.0, error], "steps": [1, 2], "seconds": [0.1, 600.0]}
                record.units[f"{name}/{method}/seed={seed}"] = {"result": {**result, "picture": None}}
    return record


@pytest.mark.parametrize(
    ("ours", "other", "bar", "seeds"),
    [
        ([1e-7, 2e-7, 9e-7], 1e-4, "holds", "holds"),
        ([1e-7, 2e-7, 9e-4], 1e-6, "holds in part", "does not hold"),
        ([2e-6, 3e-6, 4e-6], 1e-6, "does not hold", "holds"),
    ],
)
def test_verdicts(ours: list[float], other: float, bar: str, seeds: str) -> None:
    record = made_up(ours, other)
    found = SimpleNamespace(bar=judge_bar("burgers")(record), seeds=judge_seeds(record))
    assert (found.bar.judgement, found.seeds.judgement) == (bar, seeds)
    record.settings["budget"] = {"burgers": 60.0, "helmholtz": 60.0}
    assert judge_bar("burgers")(record) is None
