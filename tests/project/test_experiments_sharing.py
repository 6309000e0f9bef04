"""Fig. 4's experiment: what is compared with what, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import sharing, sharing_report
from experiments.record import Context, Record

STILL = {**sharing.SMOKE, "train_size": 64, "test_size": 32, "batch_size": 64, "epochs": 3, "lr": 0.0, "alphas": [1e-2]}


def _epochs(unit: str, tmp_path: Path, **changes: object) -> list[dict]:
    return sharing.run(unit, {**STILL, **changes}, Context("cpu", None, tmp_path / unit.replace("/", "-")))["epochs"]


def test_without_learning_the_same_samples_keep_their_factors(tmp_path):
    """One batch of all samples, at a learning rate of 0: fresh factors are the stored ones, sample by sample."""
    epochs = _epochs("sample/alpha=0.01/seed=0", tmp_path)
    assert "correlation" not in epochs[0]
    for epoch in epochs[1:]:
        assert list(epoch["correlation"].values()) == pytest.approx([1.0] * 4, abs=1e-3)


def test_by_position_they_meet_other_samples(tmp_path):
    epochs = _epochs("fngd/alpha=0.01/seed=0", tmp_path)
    assert all(abs(value) < 0.6 for value in epochs[1]["correlation"].values())
    assert all(value > 0.9 for value in epochs[1]["cosine"].values())


def test_refreshed_epochs_and_fresh_methods_have_nothing_to_compare(tmp_path):
    epochs = _epochs("refreshed/alpha=0.01/seed=0", tmp_path, refresh_epochs=2)
    assert ["correlation" in epoch for epoch in epochs] == [False, True, False]
    assert not any("correlation" in epoch for epoch in _epochs("ngd/alpha=0.01/seed=0", tmp_path))
    constant = _epochs("constant/seed=0", tmp_path)
    assert {(epoch["factor_mean"], epoch["factor_std"]) for epoch in constant} == {(1.0, 0.0)}


def test_a_run_goes_on_with_the_same_numbers(tmp_path):
    from experiments.record import Stopped

    unit, changes = "fngd/alpha=0.01/seed=1", {"lr": 0.05, "batch_size": 16}
    settings = {**STILL, **changes}
    whole = sharing.run(unit, settings, Context("cpu", None, tmp_path / "a.pt"))
    calls = iter(range(1000))
    context = Context("cpu", None, tmp_path / "b.pt", stopping=lambda: next(calls) == 6)  # in the second epoch
    with pytest.raises(Stopped):
        sharing.run(unit, settings, context)
    assert sharing.run(unit, settings, Context("cpu", None, tmp_path / "b.pt")) == whole


def test_verdicts_compare_seed_by_seed():
    def result(accuracy: float, correlation: float = 0.0) -> dict:
        last = {"test_accuracy": accuracy, "train_loss": 1.0, "correlation": {"0": correlation, "1": correlation}}
        return {"result": {"epochs": [last], "finite": True}}

    settings = {**STILL, "epochs": 1, "alphas": [1e-3, 1e-1]}
    units = {}
    for seed in range(3):
        base = 80.0 + 5 * seed  # seeds differ much more than methods
        units[f"constant/seed={seed}"] = result(base)
        for alpha in (1e-3, 1e-1):
            units[f"ngd/alpha={alpha:g}/seed={seed}"] = result(base + 1 + 0.1 * seed)
            units[f"fngd/alpha={alpha:g}/seed={seed}"] = result(base + (0 if alpha < 1e-2 else 1))
            units[f"permuted/alpha={alpha:g}/seed={seed}"] = result(base)
            units[f"sample/alpha={alpha:g}/seed={seed}"] = result(base, 0.95)
    record = Record("sharing", "small", "cpu", settings, [], units)
    found = [claim.judge(record) for claim in sharing_report.CLAIMS]
    assert [verdict.judgement for verdict in found if verdict] == ["holds in part", "holds in part", "holds", "holds"]
    assert "α=0.001: -1.10 ± 0.10" in found[0].measured  # type: ignore[union-attr]
    record.units = {unit: entry for unit, entry in units.items() if unit.endswith("seed=0")}
    assert next(claim.judge(record) for claim in sharing_report.CLAIMS) is None  # one seed has no spread
