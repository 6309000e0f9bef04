"""`python -m fngd compare`: what it writes, that it can be interrupted, and what it says about mistakes."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fngd.__main__ import main
from fngd.training import data, settings
from fngd.training.compare_command import bars
from fngd.training.loop import Comparison, Progress, batches
from fngd.training.models import MODELS, ResNet, build_model
from fngd.training.recipes import OPTIMIZERS, SCHEDULES
from fngd.training.settings import Config

SMALL = [
    "--train-size",
    "100",
    "--batch-size",
    "32",
    "--epochs",
    "2",
    "--seeds",
    "0,1",
    "--model",
    "mlp",
    "--no-memory",
]


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def without_times(history: dict) -> dict:
    return {
        name: {seed: [{k: v for k, v in e.items() if k != "seconds"} for e in epochs] for seed, epochs in runs.items()}
        for name, runs in history.items()
    }


def test_it_writes_a_table_json_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", "--out", str(tmp_path), *SMALL]) == 0
    printed = capsys.readouterr().out
    for word in ("sgd", "adamw", "ngd", "fngd", "accuracy, %", "train", "loss", "time /", "memory", "MiB"):
        assert word in printed
    assert "Memory: peak" not in printed  # it was not measured
    content = results(tmp_path)
    assert content["finished"]
    assert content["config"]["train_size"] == 100
    assert [row["optimizer"] for row in content["summary"]] == ["sgd", "adamw", "ngd", "fngd"]
    for row in content["summary"]:
        assert row["seeds"] == row["epochs"] == 2
        assert 0 <= row["test_accuracy_min"] <= row["test_accuracy"] <= 100
        assert row["time_ratio"] > 0
    assert content["summary"][0]["time_ratio"] == 1
    assert len(content["history"]["fngd"]["1"]) == 2
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_peak_memory_is_measured_in_another_process(tmp_path: Path) -> None:
    options = [option for option in SMALL if option != "--no-memory"]
    assert main(["compare", "--out", str(tmp_path), *options, "--optimizers", "sgd"]) == 0
    (row,) = results(tmp_path)["summary"]
    if sys.platform == "linux":
        assert row["peak_memory_mib"] > 0


def test_stopping_after_any_batch_and_resuming_changes_nothing(tmp_path: Path) -> None:
    config = Config(model="mlp", epochs=2, seeds=(3, 4), batch_size=40, train_size=100, augment=True)
    dataset = data.load("digits", train_size=100)
    whole = Comparison(config)
    assert whole.train(dataset)

    part, turns = Comparison(config), 0
    while not part.finished:
        done = part.train(dataset, stop=lambda: True, save=lambda state: state.save(tmp_path / "checkpoint.pt"))
        assert not done or part.finished
        part, turns = Comparison.load(tmp_path / "checkpoint.pt"), turns + 1
    assert turns >= 2 * 2 * 3  # seeds, epochs, batches
    assert without_times(part.history) == without_times(whole.history)


def test_ctrl_c_keeps_what_there_is(tmp_path: Path) -> None:
    """The whole program in its own process: interrupted in the middle, and finished by --resume."""
    options = ["--train-size", "400", "--batch-size", "16", "--epochs", "20", "--seeds", "0", "--no-memory"]
    command = [sys.executable, "-m", "fngd", "compare", "--out", str(tmp_path), "--optimizers", "sgd,fngd", *options]
    root = Path(__file__).parents[3]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):  # until the first epoch is saved
        if (tmp_path / "checkpoint.pt").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "--resume --out" in out
    assert "UNFINISHED" in out
    assert "stopping after this batch" in err
    before = results(tmp_path)
    assert not before["finished"]
    kept = before["history"]["fngd"]["0"]
    assert 1 <= len(kept) < 20

    assert main(["compare", "--resume", "--out", str(tmp_path), "--no-memory"]) == 0
    after = results(tmp_path)
    assert after["finished"]
    assert after["history"]["fngd"]["0"][: len(kept)] == kept
    assert len(after["history"]["fngd"]["0"]) == 20


def test_resuming_another_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--resume", "--out", str(tmp_path)])
    assert "nothing to resume: looked for" in capsys.readouterr().err
    assert main(["compare", "--out", str(tmp_path), *SMALL, "--optimizers", "sgd"]) == 0
    with pytest.raises(SystemExit):
        main(["compare", "--resume", "--out", str(tmp_path), "--epochs", "9"])
    assert "the interrupted run had --epochs 2; leave these options out" in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(SystemExit):
        main(["compare", "--resume", "--out", str(tmp_path)])
    assert "is no checkpoint of this program" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizers", "sgd,adam"], "'adam' is unknown; choose from sgd, adamw, ngd, fngd"),
        (["--optimizers", ","], "give at least one of sgd"),
        (["--seeds", "a"], "give whole numbers with commas between"),
        (["--epochs", "0"], "no whole number of at least 1"),
        (["--lr", "0.1"], "give it as sgd=0.1"),
        (["--lr", "adam=0.1"], "--lr: 'adam' is unknown; choose from sgd"),
        (["--alpha", "0"], "--alpha: got 0; it must be > 0"),
        (["--alpha", "inf"], "--alpha: got inf; it must be > 0 and finite"),
        (["--alpha", "x"], "--alpha: got x; it must be > 0 and finite"),
        (["--weight-decay", "-1"], "--weight-decay: got -1; it must be at least 0"),
        (["--weight-decay", "inf"], "--weight-decay: got inf; it must be at least 0 and finite"),
        (["--lr", "sgd=nan"], "--lr: got nan; it must be a learning rate: at least 0 and finite, as sgd=0.1"),
        (["--lr", "sgd=0.1,fngd=-1"], "--lr: got -1; it must be a learning rate: at least 0 and finite, as fngd=0.1"),
        (["--data-dir", "."], "the digits come with scikit-learn; name the data set too"),
        (["--device", "nowhere"], "--device nowhere cannot be used"),
        (["--data", "cifar10"], "cifar10 needs --data-dir"),
        (["--train-size", "99999"], "asked for 99999 training images"),
        (["--model", "resnet20"], "needs images of 16 pixels or more, these have 8; choose one of ['mlp', 'cnn']"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--out", str(tmp_path), "--no-memory", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "inspect"])
def test_a_folder_that_cannot_be_written_is_told_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture, command: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        main([command, "--out", str(tmp_path / "file")])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "no file can be written there (File exists); give another folder" in " ".join(told.split())
    assert "epoch" not in told.rpartition("usage")[0]


def test_bars_and_losses_fit_80_columns(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    comparison = Comparison(Config(optimizers=("sgd", "adamw", "ngd", "fngd"), epochs=20))
    losses = dict.fromkeys(comparison.config.optimizers, 0.1234)
    with bars(comparison) as show:
        show(Progress(seed=2, epoch=19, batch=22, steps_per_epoch=23, losses=losses))
    told = capsys.readouterr().err
    assert "seed 2, epoch 20/20" in told
    assert "━" * 30 in told
    assert "23/23" in told
    assert "loss:  sgd 0.123  adamw 0.123  ngd 0.123  fngd 0.123" in told
    assert "…" not in told
    assert told.endswith("\n")  # what is printed next begins a line


def test_help_names_everything(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    text = capsys.readouterr().out
    for name in (*OPTIMIZERS, *MODELS, *data.DATASETS, *SCHEDULES):
        assert name in text


def test_names_that_are_read_without_torch_are_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(settings.OPTIMIZERS) == list(OPTIMIZERS)
    assert list(settings.MODELS) == list(MODELS)
    assert list(settings.SCHEDULES) == list(SCHEDULES)
    assert list(settings.DEFAULTS) == list(data.DATASETS)
    monkeypatch.setitem(OPTIMIZERS, "mine", dataclasses.replace(OPTIMIZERS["sgd"], help="of my own"))
    assert settings.optimizers() == {**settings.OPTIMIZERS, "mine": "of my own"}


@pytest.mark.parametrize("command", ["compare", "inspect"])
def test_a_batch_that_is_larger_than_the_data_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture, command: str
) -> None:
    once = ["--train-size", "40", "--model", "mlp", "--epochs", "1", "--out", str(tmp_path)]
    once += ["--seeds", "0", "--optimizers", "sgd", "--no-memory"] if command == "compare" else []
    words = "--batch-size 41: there are 40 training images, and each batch holds all of them"
    assert main([command, *once, "--batch-size", "41"]) == 0
    assert words in capsys.readouterr().err
    assert main([command, *once, "--batch-size", "40"]) == 0
    assert "there are 40" not in capsys.readouterr().err


def test_every_optimizer_sees_the_same_batches() -> None:
    split = data.load("digits", train_size=50).train
    config = Config(batch_size=20, augment=True)
    first, second = (list(batches(split, config, seed=1, epoch=2)) for _ in range(2))
    assert [len(labels) for _, labels in first] == [20, 20, 10]
    for (a, x), (b, y) in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)
    later = list(batches(split, config, seed=1, epoch=2, start=1))
    assert torch.equal(later[0][0], first[1][0])
    other = next(batches(split, config, seed=1, epoch=3))
    assert not torch.equal(other[1], first[0][1])


def test_schedules() -> None:
    assert [SCHEDULES["step"](p) for p in (0, 0.49, 0.5, 0.74, 0.75, 1)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert SCHEDULES["cosine"](0) == 1
    assert SCHEDULES["cosine"](1) == pytest.approx(0)


def test_models() -> None:
    for depth, parameters in ((20, 0.27e6), (32, 0.46e6), (110, 1.7e6)):  # He et al., Table 6
        assert sum(p.numel() for p in ResNet(depth).parameters()) == pytest.approx(parameters, rel=0.03)
    with pytest.raises(ValueError, match="6n \\+ 2"):
        ResNet(21)
    state = torch.get_rng_state()
    a, b = (build_model("resnet20", size=32, channels=3, classes=10, seed=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert a(torch.randn(2, 3, 32, 32)).shape == (2, 10)
