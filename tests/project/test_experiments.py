"""The frame of the experiments: units are kept, skipped, refused and drawn as `experiments.record` says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from experiments import __main__ as command
from experiments import correlation, equations, images, options, pinn, sharing, step_time, translation, verdicts
from experiments import record as records
from experiments.record import Claim, Experiment, Record, Verdict
from fngd.training import data

MODULES = (correlation, equations, images, pinn, sharing, step_time, translation)
RAN: list[str] = []


def _run(unit, settings, context):
    done = context.load() or 0
    for step in range(int(done), settings["steps"]):
        context.save(torch.tensor(step + 1))
        context.progress(step + 1, settings["steps"], "counting")
        RAN.append(f"{unit}:{step}")
    return {"value": settings["steps"] / 3, "bad": float("nan")}


def _draw(record: Record, stem: Path) -> list[Path]:
    path = stem.with_suffix(".png")
    path.write_bytes(b"drawn")
    return [path]


def _judge(record: Record) -> Verdict | None:
    if len(record.results) < 2:
        return None
    return Verdict(f"{len(record.results)} units | of {record.scale}", "holds")


TOY = Experiment(
    name="toy",
    help="counts",
    source="nowhere",
    scales={"small": {"steps": 3, "seeds": [0, 1]}, "smoke": {"steps": 1, "seeds": [0]}},
    units=lambda settings: [f"seed={seed}" for seed in settings["seeds"]],
    run=_run,
    report=lambda record: f"# toy\n\n{len(record.units)} units on {record.where()}\n",
    draw=_draw,
    claims=(Claim("Toys can count", _judge), Claim("Toys can fly", lambda record: None)),
    growing=("seeds",),
)


@pytest.fixture(autouse=True)
def _only_the_toy(monkeypatch):
    RAN.clear()
    monkeypatch.setattr(records, "experiments", lambda: {"toy": TOY})
    monkeypatch.setattr(command, "declared", lambda: {"toy": TOY})


def _call(tmp_path, *arguments: str) -> int:
    return command.main([*arguments, "--out", str(tmp_path)])


def test_finished_units_are_skipped_and_growing_settings_add_units(tmp_path, capsys):
    assert _call(tmp_path, "toy", "--only", "seed=1") == 0
    assert RAN == ["seed=1:0", "seed=1:1", "seed=1:2"]
    assert _call(tmp_path, "toy") == 0
    assert RAN[3:] == ["seed=0:0", "seed=0:1", "seed=0:2"]
    assert _call(tmp_path, "toy", "--set", "seeds=[0,1,7]") == 0
    assert RAN[6:] == ["seed=7:0", "seed=7:1", "seed=7:2"]
    content = json.loads((tmp_path / "toy-small.json").read_text())
    assert sorted(content["units"]) == ["seed=0", "seed=1", "seed=7"]
    assert content["units"]["seed=0"]["result"] == {"value": 1.0, "bad": None}
    # the metadata of some builds lack the local part
    found = content["environments"][0]["versions"]["torch"]
    assert found.split("+")[0] == torch.__version__.split("+")[0]
    assert content["settings"] == {"steps": 3, "seeds": [0, 1, 7]}
    assert (tmp_path / "toy-small.png").read_bytes() == b"drawn"
    assert "3 units on" in (tmp_path / "toy-small.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy-small.json", "toy-small.md", "toy-small.png"]


def test_other_settings_are_refused(tmp_path, capsys):
    assert _call(tmp_path, "toy") == 0
    with pytest.raises(SystemExit):
        _call(tmp_path, "toy", "--set", "steps=4")
    assert "was measured with steps=3, now asked for steps=4; give another --out" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["toy", "--set", "stepz=4"], "NAME being one of steps, seeds"),
        (["toy", "--set", "steps=four"], "is no JSON"),
        (["toy", "--only", "fish*"], "the units are seed=0, seed=1"),
        (["toy", "--device", "toaster"], "--device toaster cannot be used"),
        (["toy", "--minutes", "nan"], "'nan' is no number of minutes"),
        (["toy", "--minutes", "-1"], "'-1' is no number of minutes"),
        (["toy", "--threads", "0"], "no whole number of at least 1"),
        (["draw", "tou"], "the experiments are toy"),
    ],
)
def test_mistakes_are_told(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        _call(tmp_path, *arguments)
    assert stop.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_folder_that_cannot_be_written_is_told_before_the_first_unit(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        _call(tmp_path / "file", "toy")
    assert stop.value.code == 2
    assert "no file can be written there (File exists); give another folder" in " ".join(
        capsys.readouterr().err.split()
    )


def test_what_is_read_of_the_files_is_what_they_make():
    made = {module.EXPERIMENT.name: module.EXPERIMENT for module in MODULES}
    read = options.declared()
    assert read.keys() == made.keys()
    for name, experiment in made.items():
        for field in ("name", "help", "source"):
            assert getattr(read[name], field) == getattr(experiment, field)
        assert {scale: list(settings) for scale, settings in read[name].scales.items()} == {
            scale: list(settings) for scale, settings in experiment.scales.items()
        }


@pytest.mark.parametrize("command", ["draw", "verdicts"])
def test_results_that_are_not_there_empty_no_table(tmp_path, capsys, command):
    with pytest.raises(SystemExit) as stop:
        _call(tmp_path / "nowhere", command)
    assert stop.value.code == 2
    assert "nowhere is no folder; give the one that holds the results" in " ".join(capsys.readouterr().err.split())


def test_a_unit_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    count = 0

    def stopping(self, done, total, text=""):
        nonlocal count
        count += 1
        if count == 3:  # asked once before the unit, then after each step: the second step is the last
            raise records.Stopped

    with monkeypatch.context() as patch:
        patch.setattr(records.Context, "progress", stopping)
        assert _call(tmp_path, "toy", "--only", "seed=0") == 130
    assert RAN == ["seed=0:0"]
    assert not (tmp_path / "toy-small.json").exists()
    assert _call(tmp_path, "toy", "--only", "seed=0") == 0
    assert RAN == ["seed=0:0", "seed=0:2"]  # the checkpoint of step 2 was written before the interruption
    assert not (tmp_path / "toy-small.unfinished").exists()


def test_the_time_limit_ends_the_command_and_keeps_what_is_finished(tmp_path):
    assert _call(tmp_path, "toy", "--minutes", "0") == 130
    assert RAN == []


def test_all_goes_on_after_a_failure_and_tells_it(tmp_path, monkeypatch, capsys):
    broken = dataclasses.replace(TOY, name="broken", run=lambda *_: data.load("cifar10"))
    monkeypatch.setattr(records, "experiments", lambda: {"broken": broken, "toy": TOY})
    assert _call(tmp_path, "all", "--scale", "smoke", "--minutes", "1") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("broken        FAILED: cifar10 needs --data-dir")
    assert lines[-1] == "toy           finished"
    monkeypatch.setattr(records, "experiments", lambda: {"toy": TOY})
    assert _call(tmp_path, "all", "--scale", "small", "--minutes", "0") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "toy           unfinished; the same command goes on"


def test_two_processes_add_to_one_file(tmp_path):
    path = tmp_path / "toy-small.json"
    first = records.open_record(TOY, "small", "cpu", dict(TOY.scales["small"]), path)
    second = records.open_record(TOY, "small", "cpu", dict(TOY.scales["small"]), path)
    first.add("seed=0", {"value": 1}, 0.1, [None, None], path)
    second.add("seed=1", {"value": 2}, 0.1, [None, None], path)
    assert sorted(records.load_record(path).units) == ["seed=0", "seed=1"]


def test_verdicts_come_from_the_results_alone(tmp_path):
    readme = tmp_path / "README.md"
    with pytest.raises(ValueError, match="must hold the lines"):
        verdicts.write({"toy": TOY}, tmp_path, readme)
    readme.write_text(f"before\n{verdicts.BEGIN}\nstale row\n{verdicts.END}\nafter\n")
    verdicts.write({"toy": TOY}, tmp_path, readme)
    assert readme.read_text().count("not yet measured") == 2
    _call(tmp_path, "toy")
    _call(tmp_path, "toy", "--scale", "smoke")
    assert _call(tmp_path, "verdicts", "--readme", str(readme)) == 0
    text = readme.read_text()
    assert "| Toys can count | [small](results/toy-small.md) | 2 units \\| of small | **holds** |" in text
    assert "| Toys can fly | `toy` | not yet measured | – |" in text
    assert "stale row" not in text
    assert text.startswith("before")
    assert text.endswith("after\n")


def test_a_judgement_is_one_of_a_few():
    with pytest.raises(ValueError, match="choose one of"):
        Verdict("3 ± 1", "sort of")


def test_a_file_that_is_no_record_is_refused(tmp_path, capsys):
    (tmp_path / "toy-small.json").write_text("{}")
    with pytest.raises(SystemExit):
        _call(tmp_path, "toy")
    assert "holds no results of this program" in capsys.readouterr().err
