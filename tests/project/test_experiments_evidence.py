"""No verdict from made-up results with a diverged run, with two seeds, or with a winner at the edge of its grid."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from experiments import (
    evidence,
    images,
    images_report,
    pinn,
    sharing,
    sharing_report,
    step_time_claims,
    translation,
    translation_report,
    tuning,
)
from experiments.record import Record, Verdict

MIDDLE = {"lr": 0.1, "damping": 0.03, "alpha": 1e-2}


def trials(figure: str, best: dict[str, float], *, smallest: bool = False) -> list[dict[str, Any]]:
    """Trials of three values for each option, one of which is best."""
    found = []
    for name, factor in itertools.product(best, (0.1, 1.0, 10.0)):
        options = {**best, name: best[name] * factor}
        value = 50.0 if options == best else 40.0
        found.append({"options": options, "epochs": [{figure: -value if smallest else value}], "diverged": False})
    return found


def at_the_edge(tried: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in tried if each["options"]["lr"] <= MIDDLE["lr"]]


def image_record(seeds: Sequence[int] = (0, 1, 2), *, lost: str = "", edge: str = "") -> Record:
    names = ["sgd", "adamw", "kfac", "shampoo", "eva", "skfac", "fngd", "sgd-long"]
    task = {**images.DIGITS, "targets": [50.0, 80.0]}
    settings = {**images.SMALL, "tasks": {"digits": task}, "methods": names[:-1], "seeds": list(seeds)}
    record = Record("images", "small", "cpu", settings)
    for name in names:
        for seed in seeds:
            accuracy = {"fngd": 90.0}.get(name, 80.0) + seed
            epoch = {"accuracy": accuracy, "train_loss": 1.0, "process_seconds": 1.0}
            result = {"options": MIDDLE, "epochs": [epoch], "diverged": name == lost and seed == 0}
            record.units[f"digits/{name}/seed={seed}"] = {"result": result}
        tried = trials("accuracy", MIDDLE)
        for number, trial in enumerate(at_the_edge(tried) if name == edge else tried):
            record.units[f"tune/digits/{name}/{number}"] = {"result": trial}
    return record


def translation_record(seeds: Sequence[int] = (0, 1, 2), *, lost: str = "", edge: str = "") -> Record:
    record = Record("translation", "small", "cpu", {**translation.SMALL, "seeds": list(seeds)})
    for name in translation.METHODS:
        for seed in seeds:
            epochs = [{"process_seconds": 1.0, "train_loss": 1.0, "loss": 1.0, "bleu": 1.0}]
            score = (30.0 if name == "fngd" else 10.0) + seed
            test = {"beam": score, "greedy": score, "signature": "s", "examples": []}
            result = {"options": MIDDLE, "epochs": epochs, "diverged": name == lost and seed == 0, "test": test}
            record.units[f"{name}/seed={seed}"] = {"result": result}
        tried = trials("loss", MIDDLE, smallest=True)
        for number, trial in enumerate(at_the_edge(tried) if name == edge else tried):
            record.units[f"tune/{name}/{number}"] = {"result": trial}
    return record


def sharing_record(seeds: Sequence[int] = (0, 1, 2), *, lost: str = "") -> Record:
    settings = {**sharing.SMALL, "epochs": 1, "alphas": [1e-2]}
    record = Record("sharing", "small", "cpu", settings)
    for method, seed in itertools.product(("constant", "ngd", "fngd", "permuted", "sample"), seeds):
        last = {"test_accuracy": 80.0 + seed, "train_loss": 1.0, "correlation": {"0": 0.95, "1": 0.95}}
        unit = f"{method}/seed={seed}" if method == "constant" else f"{method}/alpha=0.01/seed={seed}"
        record.units[unit] = {"result": {"epochs": [last], "finite": not (method == lost and seed == 0)}}
    return record


def pinn_record(
    seeds: Sequence[int] = (0, 1, 2), *, lost: str = "", rates: Sequence[float] = (0.1, 0.01, 0.001)
) -> Record:
    methods = ["gauss-newton", *(f"adam/lr={rate:g}" for rate in rates)]
    record = Record("pinn", "small", "cpu", {**pinn.SMALL, "methods": methods})
    for method, seed in itertools.product(methods, seeds):
        error: float | None = 1e-7 if method == "gauss-newton" else 1e-3 if method == "adam/lr=0.01" else 1e-2
        if method == lost and seed == 0:
            error = None
        result = {"error": [1.0, error], "loss": [1.0, error], "steps": [1, 2], "seconds": [0.1, 20.0], "picture": None}
        record.units[f"poisson2/{method}/seed={seed}"] = {"result": result}
    return record


def judged(claims: Sequence[Any], record: Record) -> list[Verdict]:
    return [found for claim in claims if (found := claim.judge(record)) is not None]


CASES: list[tuple[Any, Any, int]] = [
    (image_record, images_report.CLAIMS, 3),
    (translation_record, translation_report.CLAIMS, 3),
    (sharing_record, sharing_report.CLAIMS, 4),
    (pinn_record, pinn.EXPERIMENT.claims, 1),
]


@pytest.mark.parametrize(("build", "claims", "count"), CASES)
def test_sound_results_are_judged(build: Any, claims: Any, count: int) -> None:
    found = judged(claims, build())
    assert len(found) == count
    assert all(each.judgement != "undecided" and "n = 3 seeds" in each.measured for each in found), found


@pytest.mark.parametrize(("build", "claims", "count"), CASES)
def test_two_seeds_are_too_few(build: Any, claims: Any, count: int) -> None:
    found = judged(claims, build((0, 1)))
    assert len(found) == count
    for each in found:
        assert each.judgement == "undecided"
        assert "n = 2 seeds; no verdict: n = 2, and 3 are needed" in each.measured


@pytest.mark.parametrize(
    ("build", "claims", "lost"),
    [
        (image_record, images_report.CLAIMS, "fngd"),
        (translation_record, translation_report.CLAIMS, "fngd"),
        (sharing_record, sharing_report.CLAIMS[:2], "fngd"),
        (pinn_record, pinn.EXPERIMENT.claims, "gauss-newton"),
    ],
)
def test_a_diverged_run_forbids_a_verdict_and_does_not_count(build: Any, claims: Any, lost: str) -> None:
    for each in judged(claims, build((0, 1, 2, 3), lost=lost)):
        assert each.judgement == "undecided"
        assert "n = 3 seeds" in each.measured, "four ran, one of them diverged"
        assert "diverged in 1 of 4 runs" in each.measured


@pytest.mark.parametrize(
    ("build", "claims", "edge"),
    [(image_record, images_report.CLAIMS, "fngd"), (translation_record, translation_report.CLAIMS[:2], "fngd")],
)
def test_a_winner_at_the_edge_of_its_grid_gets_no_verdict(build: Any, claims: Any, edge: str) -> None:
    for each in judged(claims, build(edge=edge)):
        assert each.judgement == "undecided"
        assert f"the best trial of {edge}" in each.measured
        assert "is at the edge of its grid (lr)" in each.measured


def test_a_baseline_at_the_edge_of_its_rates_gets_no_verdict() -> None:
    (found,) = judged(pinn.EXPERIMENT.claims, pinn_record(rates=(0.01, 0.001)))
    assert found.judgement == "undecided"
    assert "the best trial of adam/lr=0.01 is at the edge of its grid (lr)" in found.measured


def test_other_methods_edges_do_not_matter() -> None:
    found = judged(images_report.CLAIMS, image_record(edge="adamw", lost="adamw"))
    assert all(each.judgement != "undecided" for each in found)


def test_two_values_have_edges() -> None:
    tried = tuning.grid(damping=[0.03, 0.003], lr=[0.1, 0.03, 0.3])
    assert tuning.at_edge({"damping": 0.03, "lr": 0.1}, tried) == ["damping"]
    assert tuning.at_edge({"lr": 0.1}, tuning.grid(lr=[0.1])) == []


def test_diverged_runs_are_in_the_tables() -> None:
    shown = images_report.report(image_record(lost="fngd"))
    assert "| fngd | 2, and 1 diverged |" in shown
    assert "Diverged, and in no mean: digits/fngd/seed=0." in shown
    assert "| fngd | 2, and 1 diverged |" in translation_report.report(translation_record(lost="fngd"))


def test_times_of_two_rounds_are_not_judged() -> None:
    def record(rounds: int) -> Record:
        times = {key: {"round": list(range(rounds)), "wall": [1.0] * rounds, "process": [1.0] * rounds}
                 for key in ("sgd/step", "ngd/step", "fngd/stored", "fngd/compute")}  # fmt: skip
        result = {"times": times, "parts": {}, "batch": 1, "parameters": 1}
        settings = {"models": ["resnet32"], "methods": ["sgd", "ngd", "fngd"], "epochs": 100}
        return Record("step_time", "small", "cpu", settings, [], {"resnet32/process=0": {"result": result}})

    assert step_time_claims.judge_ngd(record(2)) is not None
    (two,) = judged(step_time_claims.CLAIMS, record(2))
    assert two.judgement == "undecided"
    assert "n = 2 rounds, and 3 are needed" in two.measured
    (three,) = judged(step_time_claims.CLAIMS, record(3))
    assert three.judgement != "undecided"


def test_n_is_the_least_over_tasks() -> None:
    full = {"a": {0: False, 1: False, 2: False}}
    assert evidence.count([full, {"a": {0: False, 1: True, 2: False}}]) == 2
    assert evidence.count([]) == 0
    assert evidence.objections([full], {"a": []}) == []
