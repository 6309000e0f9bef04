"""Tuning and runs of the training experiments: equal trials, splits apart, stopping, resuming, diverging."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiments import images, runs, translation, tuning
from experiments.__main__ import main
from experiments.record import Context, Stopped

CPU = "cpu"


@pytest.mark.parametrize(("settings", "kind"), [
    *[(images.EXPERIMENT.scales[s], "images") for s in ("small", "full")],
    *[(translation.EXPERIMENT.scales[s], "translation") for s in ("small", "full")],
])  # fmt: skip
def test_every_method_has_the_same_number_of_trials(settings, kind):
    for method in settings["methods"]:
        grid = tuning.trials(method, kind, settings["trials"])
        assert len(grid) == len({tuple(each.items()) for each in grid}) == settings["trials"], method
    names = translation.units(settings) if kind == "translation" else images.units(settings)
    assert len(names) == len(set(names))


def test_the_best_trial_is_the_one_that_validation_says():
    results = {
        f"tune/sgd/{n}": {"options": {"lr": lr}, "diverged": lr == 3, "epochs": [{"loss": 9.0}, {"loss": loss}]}
        for n, (lr, loss) in enumerate([(1, 0.5), (2, 0.4), (3, 0.1)])
    }
    assert tuning.best(results, "tune/sgd/", figure="loss", smallest=True) == {"lr": 2}
    assert tuning.best(results, "tune/sgd/", figure="loss") == {"lr": 1}
    with pytest.raises(ValueError, match=r"tune/fngd/\*: no trial is finished"):
        tuning.best(results, "tune/fngd/", figure="loss")
    with pytest.raises(ValueError, match="all 1 trials diverged"):
        tuning.best({"tune/sgd/2": results["tune/sgd/2"]}, "tune/sgd/", figure="loss")
    shown = tuning.table(results, ["sgd"], "tune/", figure="loss", smallest=True)
    assert "lr 3: diverged | lr 2 |" in shown
    with pytest.raises(ValueError, match="9 trials of 'sgd'; there are 1 … 4"):
        tuning.trials("sgd", "translation", 9)
    with pytest.raises(ValueError, match="'sdg' is unknown"):
        tuning.trials("sdg", "images", 1)


def test_validation_images_are_not_trained_on_and_test_images_not_tuned_on():
    pytest.importorskip("sklearn")
    task = {**images.DIGITS, "train_size": None, "trial_size": None, "pool": 2}
    context = Context(CPU, None, Path("unused.pt"))
    trained, held = images.splits(task, context, tuning_split=True)
    final, test = images.splits(task, context, tuning_split=False)
    included, _ = images.splits({**task, "validation_included": True}, context, tuning_split=False)
    assert len(trained.labels) == len(final.labels) == len(included.labels) - len(held.labels)
    assert torch.equal(included.images[-len(held.labels) :], held.images)
    assert len(test.labels) == 360
    assert test.images.shape[1:] == (1, 4, 4)
    with pytest.raises(ValueError, match="1400 training images of digits; there are 1237"):
        images.splits({**task, "train_size": 1400}, context, tuning_split=False)


def plan(tmp_path: Path, method: str, epochs: int = 3, lr: float = 0.05) -> runs.Plan:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
    data = torch.randn(24, 4), torch.randint(3, (24,))
    options = {"lr": lr, **({"damping": 0.03} if method in ("kfac", "ekfac", "mbf", "hylo", "eva", "skfac") else {})}

    def batches(epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(24, generator=torch.Generator().manual_seed(epoch)).split(8)
        return [(data[0][chosen], data[1][chosen]) for chosen in order]

    return runs.Plan(
        model,
        tuning.OPTIMISERS[method].build(model, tuning.Training(3, inverse_every=2, statistics_every=2), options),
        batches=batches,
        loss=lambda batch: (F.cross_entropy(model(batch[0]), batch[1]), 8.0),
        factor=lambda step: 0.9**step,
        test=lambda: {"accuracy": 100 * (model(data[0]).argmax(1) == data[1]).float().mean().item()},
        epochs=epochs,
        steps=3,
    )


def test_methods_are_checked_before_any_work(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["images", "--scale", "smoke", "--optimizers", "sgd,adam", "--out", str(tmp_path)])
    assert "'adam' is unknown; choose from" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["correlation", "--optimizers", "sgd"])
    assert "unrecognized arguments: --optimizers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method",
    [
        "sgd",
        "adamw",
        "kfac",
        "ekfac",
        "mbf",
        "hylo",
        "muon",
        "shampoo",
        "eva",
        "skfac",
        "ngd",
        "fngd",
        "fngd-per-layer",
    ],
)
def test_a_stopped_run_goes_on_with_the_same_numbers(tmp_path, method):
    whole = runs.train(plan(tmp_path, method), Context(CPU, None, tmp_path / "whole.pt"))
    calls = itertools.count()
    context = Context(CPU, None, tmp_path / "stopped.pt", stopping=lambda: next(calls) == 4)  # in the second epoch
    with pytest.raises(Stopped):
        runs.train(plan(tmp_path, method), context)
    resumed = runs.train(plan(tmp_path, method), context)
    for one, two in zip(whole["epochs"], resumed["epochs"], strict=True):
        assert one["train_loss"] == two["train_loss"]
        assert one["accuracy"] == two["accuracy"]


def test_a_function_of_ones_own_is_tuned_around_its_default_rate():
    found = tuning.optimiser("torch.optim:NAdam")
    assert found.images == tuning.grid(lr=[0.002, 0.001, 0.004, 0.0005, 0.008, 0.00025])
    assert tuning.trials("torch.optim:NAdam", "translation", 2) == tuning.grid(lr=[0.002, 0.001])
    optimizer = found.build(nn.Linear(2, 1), tuning.Training(3), {"lr": 0.5})
    assert isinstance(optimizer, torch.optim.NAdam)
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match=r"'adam' is unknown; choose from .* or give module:function"):
        tuning.optimiser("adam")
    with pytest.raises(ValueError, match="its lr has no default"):
        tuning.optimiser("torch.optim.lr_scheduler:LambdaLR")


def test_a_run_that_diverges_ends_and_says_so(tmp_path):
    result = runs.train(plan(tmp_path, "sgd", lr=1e38), Context(CPU, None, tmp_path / "run.pt"))
    assert result["diverged"]
    assert len(result["epochs"]) == 1
    assert not math.isfinite(result["epochs"][0]["train_loss"])


def test_targets_are_reached_at_the_end_of_an_epoch():
    epochs = [{"accuracy": a, "process_seconds": 2.0} for a in (10.0, 60.0, 50.0)]
    assert runs.first_epoch(epochs, "accuracy", 60) == 2
    assert runs.spent(epochs, 2) == 4.0
    assert runs.first_epoch(epochs, "accuracy", 61) is None
    assert runs.spent(epochs, None) is None
