"""The training experiments from trials to tables and verdicts, which say what the results say."""

from __future__ import annotations

import itertools

import pytest

from experiments import images, images_report, translation, translation_report
from experiments.record import Context, Record

CPU = "cpu"


def run_units(experiment, settings, tmp_path, chosen=None) -> Record:
    record = Record(experiment.name, "smoke", CPU, settings)
    path = tmp_path / f"{experiment.name}-smoke.json"
    for unit in chosen or experiment.units(settings):
        context = Context(CPU, None, path.with_suffix(".unfinished") / f"{unit.replace('/', '--')}.pt")
        record.add(unit, experiment.run(unit, settings, context), 1.0, [None, None], path)
    return record


def test_images_from_trials_to_verdicts(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    task = {**images.DIGITS, "model": "mlp", "train_size": 256, "trial_size": 128, "targets": [20.0, 101.0]}
    settings = {**images.SMOKE, "tasks": {"digits": task}, "trials": 1, "seeds": [0, 1]}
    with pytest.raises(ValueError, match=r"tune/digits/sgd/\*: no trial is finished"):
        images.run("digits/sgd/seed=0", settings, Context(CPU, None, tmp_path / "none.unfinished" / "a.pt"))
    record = run_units(images.EXPERIMENT, settings, tmp_path)
    assert len(record.results["digits/sgd-long/seed=0"]["epochs"]) == 2 * task["epochs"]
    shown = images_report.report(record)
    assert "| sgd-long | 2 |" in shown
    assert "never" in shown
    assert all(path.stat().st_size > 10_000 for path in images_report.draw(record, tmp_path / "images"))
    verdicts = [claim.judge(record) for claim in images_report.CLAIMS]
    assert all(verdict is not None and "n = 2 seeds" in verdict.measured for verdict in verdicts)
    del record.units["digits/fngd/seed=1"]
    assert [claim.judge(record) for claim in images_report.CLAIMS] == [None] * 3


def test_translation_from_trials_to_tables(tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("sacrebleu")
    pytest.importorskip("matplotlib")
    best = {"method": "adamw", "epochs": 1, "train_size": 32, "model": translation.SMOKE["model"]}
    settings = {**translation.SMOKE, "methods": ["adamw", "fngd"], "test_size": 4, "epochs": 1, "best": best}
    settings |= {"train_size": 32, "trial_size": 32}
    record = run_units(translation.EXPERIMENT, settings, tmp_path)
    assert {"greedy", "beam", "signature", "examples"} <= record.results["fngd/seed=0"]["test"].keys()
    assert "test" not in record.results["tune/fngd/0"]
    shown = translation_report.report(record)
    assert "## The long run, adamw/seed=0" in shown
    assert "| fngd | 1 |" in shown
    assert all(path.stat().st_size > 10_000 for path in translation_report.draw(record, tmp_path / "translation"))
    assert [claim.judge(record) for claim in translation_report.CLAIMS] == [None] * 3


def translations(scores: dict[str, float], seconds: dict[str, float]) -> Record:
    settings = {**translation.SMALL, "seeds": [0, 1, 2]}
    record = Record("translation", "small", CPU, settings)
    for (name, score), seed in itertools.product(scores.items(), settings["seeds"]):
        epochs = [{"process_seconds": seconds.get(name, 1.0), "train_loss": 1.0, "loss": 1.0, "bleu": score}]
        test = {"beam": score + seed, "greedy": score, "signature": "s", "examples": []}
        result = {"options": {"lr": 1.0}, "epochs": epochs, "diverged": False, "test": test}
        record.units[f"{name}/seed={seed}"] = {"result": result}
    return record


def test_verdicts_follow_the_scores():
    scores = dict.fromkeys(translation.METHODS, 10.0)
    seconds = {"kfac": 2.5, "shampoo": 5.0}

    def judged(**others: float) -> list[str]:
        record = translations({**scores, **{name.replace("_", "-"): value for name, value in others.items()}}, seconds)
        answers = [claim.judge(record) for claim in translation_report.CLAIMS]
        return [answer.judgement for answer in answers if answer is not None]

    assert judged(fngd=30.0) == ["holds", "holds", "holds"]
    assert judged(fngd=30.0, kfac=40.0) == ["holds in part", "holds", "holds"]
    assert judged(fngd=5.0, fngd_per_layer=5.0) == ["does not hold", "undecided", "holds"]
    assert judged(adamw_warmup=30.0) == ["does not hold", "does not hold", "holds"]
