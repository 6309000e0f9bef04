"""The problems of `experiments.pinn` are the equations they claim to be, and its report reads records rightly."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments import pinn
from experiments.pinn_problems import PROBLEMS, cole_hopf
from experiments.pinn_report import best_baseline, draw, judge_ratio, ratio, report
from experiments.record import Context, Record

SMOKE = pinn.SMOKE
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "poisson2": lambda x: torch.sin(math.pi * x).prod(1),
    "poisson5": lambda x: torch.cos(math.pi * x).sum(1),
    "burgers": lambda x: cole_hopf(x, SMOKE["problems"]["burgers"]["viscosity"]),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_solutions_have_no_residual(name: str) -> None:
    problem = PROBLEMS[name](0, SMOKE["problems"][name])
    assert problem.error() > 1e-2
    assert problem.loss() > 1e-3
    problem.net.forward = lambda x: EXACT[name](x).unsqueeze(1)  # type: ignore[method-assign]
    for group, residuals in problem.residuals().items():
        assert residuals.abs().max() < 1e-7, group
    assert problem.error() < 1e-12


@pytest.mark.parametrize("name", PROBLEMS)
def test_seeds_give_the_same_start_to_all_methods(name: str) -> None:
    first, second, other = (PROBLEMS[name](seed, SMOKE["problems"][name]) for seed in (0, 0, 1))
    assert first.loss() == second.loss() != other.loss()


@pytest.mark.parametrize("scale", ["small", "full", "smoke"])
def test_every_unit_has_its_settings(scale: str) -> None:
    settings = pinn.EXPERIMENT.scales[scale]
    units = pinn.units(settings)
    assert len(set(units)) == len(units)
    for problem in settings["problems"]:
        assert {problem} <= settings["budget"].keys() & settings["gauss_newton"].keys() & PROBLEMS.keys()


def test_runs_and_reports(tmp_path: Path) -> None:
    settings = {**SMOKE, "clock": "process", "problems": {k: SMOKE["problems"][k] for k in ("poisson2", "diabetes")}}
    settings["budget"] = dict.fromkeys(settings["problems"], 0.3)
    record = Record("pinn", "smoke", "cpu", settings)
    context = Context("cpu", None, tmp_path / "checkpoint")
    for unit in pinn.units(settings):
        result = pinn.run(unit, settings, context)
        assert result["seconds"][-1] >= 0.3
        assert len(result["error"]) == len(result["steps"]) >= 1
        assert math.isfinite(result["final"])
        record.units[unit] = {"result": result}
    text = report(record)
    assert "| gauss-newton | 1 |" in text
    assert "Best baseline" in text
    written = draw(record, tmp_path / "pinn")
    assert [path.name for path in written] == ["pinn-error.png", "pinn-solution.png"]
    assert all(path.stat().st_size > 1000 for path in written)


def made_up(errors: dict[str, list[float | None]]) -> Record:
    record = Record("pinn", "small", "cpu", {**pinn.SMALL, "methods": list(errors)})
    for method, values in errors.items():
        for seed, value in enumerate(values):
            result = {"error": [1.0, value], "loss": [1.0, value], "steps": [1, 2], "seconds": [0.1, 20.0]}
            record.units[f"poisson2/{method}/seed={seed}"] = {"result": {**result, "picture": None}}
    return record


def test_the_best_baseline_is_the_one_with_the_lowest_median() -> None:
    record = made_up(
        {"gauss-newton": [1e-6, 2e-6, 9e-6], "adam/lr=0.01": [1e-5, 1e-2, None], "lbfgs": [4e-3, 1e-3, 2e-4]}
    )
    assert best_baseline(record, "poisson2") == ("lbfgs", 1e-3)
    assert ratio(record, "poisson2") == pytest.approx(500)
    assert ratio(record, "burgers") is None


@pytest.mark.parametrize(
    ("ours", "judgement"), [(2e-6, "holds"), (2e-5, "does not hold"), (9e-6, "holds"), (9.9e-6, "holds in part")]
)
def test_verdicts(ours: float, judgement: str) -> None:
    other = 9.5e-4
    verdict = judge_ratio("poisson2")(made_up({"gauss-newton": [ours] * 3, "lbfgs": [other] * 3}))
    assert verdict is not None
    assert verdict.judgement == judgement
    assert judge_ratio("burgers")(made_up({"gauss-newton": [ours], "lbfgs": [other]})) is None
