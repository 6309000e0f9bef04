"""The parts of the timing experiment: kinds of steps, regions, and the averages that are formed of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiments import correlation, regions, step_time, step_time_claims, step_time_ratios, step_time_report
from experiments.record import Context, Record
from experiments.regions import REGIONS, Clock, breakdown
from experiments.sharing import likeness
from fngd.training.inspection import inspect, sorted_cosines

TINY = {
    **step_time.SMOKE,
    "models": ["transformer"],
    "processes": {"transformer": 1},
    "batch": {"transformer": 3},
    "rounds": {"transformer": 2},
    "transformer": {"words": 12, "time": 4, "width": 8, "hidden": 16, "heads": 2, "layers": 1},
}


def _tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 5))


def _loss(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(torch.ones(4, 1, 5, 5)), torch.tensor([0, 1, 2, 3]))


def test_a_region_excludes_those_within_it(monkeypatch: pytest.MonkeyPatch):
    now = 0.0

    def last(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(regions, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = Clock("cpu")
    with clock.region("backward"):
        last(0.25)
        clock.timed("solve", last)(0.5)
        last(0.125)
    assert clock.seconds == {"backward": 0.375, "solve": 0.5}


@pytest.mark.parametrize(
    ("method", "kind", "entered", "not_entered"),
    [
        ("sgd", "step", (), ("statistics", "solve", "direction")),
        ("ngd", "step", ("statistics", "solve"), ("direction",)),
        ("fngd", "compute", ("statistics", "solve"), ("direction",)),
        ("fngd", "stored", (), ("statistics", "solve", "direction")),
        ("kfac", "inverse", ("statistics", "solve", "direction"), ()),
        ("kfac", "statistics", ("statistics", "direction"), ("solve",)),
        ("kfac", "plain", ("direction",), ("solve",)),
        ("skfac", "inverse", ("statistics", "solve", "direction"), ()),
        ("skfac", "plain", ("direction",), ("solve",)),
        ("eva", "step", ("statistics", "direction"), ()),
        ("shampoo", "inverse", ("statistics", "solve", "direction"), ()),
        ("shampoo", "statistics", ("statistics", "direction"), ("solve",)),
        ("shampoo", "plain", ("direction",), ("statistics", "solve")),
    ],
)
def test_kinds_of_steps_do_what_they_are_called(method, kind, entered, not_entered):
    model = _tiny()
    opt = step_time.optimizer(method, model)
    first = {"stored": "compute"}.get(kind, "inverse")
    step_time.turn_to(opt, first)
    breakdown(model, opt, _loss, "cpu")
    step_time.turn_to(opt, kind)
    seconds = breakdown(model, opt, _loss, "cpu")
    assert list(seconds) == list(REGIONS)
    for name in ("forward", "backward", "update", *entered):
        assert seconds[name] > 0, name
    for name in not_entered:
        assert seconds[name] == 0, name


def test_watching_leaves_no_trace():
    from fngd.natural import base as natural
    from persample import LayerGrads

    before = LayerGrads.gram, dict(vars(natural))
    model = _tiny()
    breakdown(model, step_time.optimizer("ngd", model), _loss, "cpu")
    assert before == (LayerGrads.gram, dict(vars(natural)))


@pytest.mark.parametrize("method", step_time.METHODS)
def test_shares_add_up(method):
    assert sum(step_time_ratios.shares(method, 100).values()) == pytest.approx(1)


def _result(times: dict, parts: dict | None = None) -> dict:
    return {"times": times, "parts": parts or {}, "batch": 1, "parameters": 1}


def test_an_average_step_is_weighed_by_shares_within_each_round():
    times = {
        "sgd/step": {"round": [0, 1], "wall": [1.0, 2.0], "process": [1.0, 1.0]},
        "kfac/plain": {"round": [0, 1], "wall": [2.0, 4.0], "process": [2.0, 2.0]},
        "kfac/statistics": {"round": [0, 1], "wall": [3.0, 6.0], "process": [3.0, 3.0]},
        "kfac/inverse": {"round": [], "wall": [100.0], "process": [50.0]},
    }
    found = step_time_ratios.ratio(_result(times), "kfac", 100)
    assert found is not None
    # By hand: 0.9 · 2 + 0.09 · 3 + 0.01 · 100 over 1, and 0.9 · 4 + 0.09 · 6 + 0.01 · 100 over 2.
    assert found.median == pytest.approx((3.07 + 2.57) / 2)
    assert step_time_ratios.ratio(_result(times), "kfac", 100, kind="plain").median == pytest.approx(2)
    assert step_time_ratios.ratio(_result(times), "kfac", 100, clock="process").median == pytest.approx(2.57)
    assert step_time_ratios.ratio(_result(times), "eva", 100) is None


def test_decompositions_whose_parts_were_not_taken_are_known_by_their_total():
    one = dict.fromkeys(REGIONS, 1.0)
    times = {f"kfac/{kind}": {"round": [], "wall": [wall]} for kind, wall in
             (("plain", 5.0), ("statistics", 6.0), ("inverse", 106.0))}  # fmt: skip
    parts = {"kfac/plain": [{**one, "solve": 0.0}], "kfac/statistics": [{**one, "solve": 0.0}]}
    found = step_time_ratios.parts(_result(times, parts), "kfac", 100)
    assert found["solve"] == pytest.approx(0.01 * 100)
    assert found["forward"] == pytest.approx(1)


def test_a_model_is_timed_and_reported(tmp_path: Path):
    seen: list[str] = []
    units = step_time.units({**TINY, "processes": {"transformer": 2}})
    assert units == ["transformer/process=0", "transformer/process=1"]
    result = step_time.run(units[0], TINY, Context("cpu", None, tmp_path / "x.pt", show=lambda *p: seen.append(p[2])))
    assert "round 2, fngd" in seen
    other = step_time.measure("transformer", 1, TINY, "cpu", lambda *_: None)
    record = Record("step_time", "smoke", "cpu", TINY, [], {units[0]: {"result": result}, units[1]: {"result": other}})
    whole = step_time_ratios.results(record)["transformer"]
    for key in ("fngd/stored", "kfac/inverse"):
        assert whole["times"][key]["wall"] == result["times"][key]["wall"] + other["times"][key]["wall"]
    assert whole["times"]["fngd/stored"]["round"] == [0, 1, 2, 3]
    assert len(whole["parts"]["fngd/stored"]) == 2
    assert set(result["times"]) == {
        f"{m}/{kind}" for m in step_time.METHODS for kind in step_time_ratios.shares(m, 100)
    }
    assert all(len(entry["wall"]) == len(entry["round"]) or "inverse" in key for key, entry in result["times"].items())
    text = step_time_report.report(record)
    assert text.count("| transformer | kfac | ") == 4  # three kinds, one row of parts
    assert step_time_claims.judge_transformer(record) is not None
    assert step_time_claims.judge_lowest(record) is None  # it needs the ResNets
    assert step_time_report.draw(record, tmp_path / "figure")[0].stat().st_size > 10_000


def test_likeness_of_factors():
    first = torch.tensor([1.0, 1.2, 0.8])
    cosine, correlation_ = likeness(first, 2 - first)
    assert cosine.item() > 0.9
    assert correlation_.item() == pytest.approx(-1, abs=1e-5)


def test_matrices_survive_packing():
    found = inspect(_tiny(), torch.randn(6, 1, 5, 5), torch.tensor([1, 0, 2, 0, 1, 2]))
    matrix = correlation.unpacked(correlation._packed(found, "0"), 6)
    torch.testing.assert_close(matrix, sorted_cosines(found, "0"), atol=0.006, rtol=0)


def test_verdicts_follow_from_the_times():
    def result(**seconds: float) -> dict:
        times = {}
        for method in step_time.METHODS:
            for kind in step_time_ratios.shares(method, 100):
                times[f"{method}/{kind}"] = {"round": [0, 1, 2], "wall": [seconds[method]] * 3, "process": [1.0] * 3}
        parts = {key: [dict.fromkeys(REGIONS, entry["wall"][0] / 6)] for key, entry in times.items()}
        return {**_result(times, parts), "batch": 8}

    good = {"sgd": 1.0, "adamw": 1.1, "kfac": 2.0, "shampoo": 1.8, "eva": 1.6, "skfac": 1.7, "ngd": 2.4, "fngd": 1.1}
    units = {model: {"result": result(**good)} for model in step_time.MODELS}
    settings = {**step_time.SMALL, "models": list(step_time.MODELS)}
    record = Record("step_time", "small", "cpu", settings, [], units)
    judgements = [claim.judge(record).judgement for claim in step_time_claims.CLAIMS]  # type: ignore[union-attr]
    assert judgements == ["holds"] * 5 + ["does not hold"]  # the backward pass takes 1.1 of SGD's
    slow = result(**{**good, "fngd": 1.75})
    record.units["resnet34"] = {"result": slow}
    verdicts = [claim.judge(record) for claim in step_time_claims.CLAIMS[:3]]
    assert [verdict.judgement for verdict in verdicts if verdict] == ["holds in part", "holds in part", "holds in part"]
    said = verdicts[0].measured  # type: ignore[union-attr]
    assert "resnet32 1.10 (1.10–1.10), next eva 1.60 (1.60–1.60), FNGD faster in 3 of 3 rounds" in said
    assert "resnet34 1.75 (1.75–1.75), next eva 1.60 (1.60–1.60), FNGD faster in 0 of 3 rounds" in said
    for model in step_time.MODELS:
        record.units[model] = {"result": slow}
    judgements = [claim.judge(record).judgement for claim in step_time_claims.CLAIMS[:5]]  # type: ignore[union-attr]
    assert judgements == ["does not hold", "does not hold", "holds in part", "holds in part", "holds in part"]
