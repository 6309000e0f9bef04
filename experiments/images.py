"""Image classification: epochs and seconds to a target accuracy, and the final one (FNGD paper, Table II, Fig. 5–6).

Every method of a task has the same epochs, the same schedule (learning rate × 0.1 at 50 % and 75 %), the same batches
and the same number of tuning trials (`experiments.tuning`). `sgd-long` is SGD with twice the epochs, as the paper
trains it; `sgd` is SGD on the schedule that the paper gives to second-order methods only. Both have SGD's best trial.

Tasks (setting "tasks", by name): "data", "model", "pool" (images are averaged over pool × pool pixels), "train_size"
(the first ones; null all but the validation images), "validation_size" (the last ones of the training set, which no
run trains on but that of "validation_included"), "test_size", "epochs", "batch_size", "augment", "inverse_every"
(of KFAC and Shampoo), "targets" (per cent), and of a trial "trial_size" and "trial_epochs".

Small scale, measured as process seconds of SGD on one core: a Fashion-MNIST epoch (10,000 images, CNN) 1.5 s; one of
CIFAR-10 averaged to 16 × 16 pixels (10,000 images, ResNet-20) 6 s, where 32 × 32 would take 27 s. With 10 methods and
3 seeds about 9 + 30 minutes, and 10 for 54 + 54 trials.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from experiments import tuning
from experiments.images_report import CLAIMS, draw, report
from experiments.record import Context, Experiment, Result, Settings
from experiments.runs import Plan, train
from fngd.training import data, loop
from fngd.training.models import build_model
from fngd.training.recipes import SCHEDULES
from fngd.training.settings import Config

METHODS = ["sgd", "adamw", "kfac", "shampoo", "eva", "skfac", "ngd", "fngd", "fngd-per-layer"]
TRIAL_SEED = 1000
FASHION: Settings = {
    "data": "fashion-mnist",
    "model": "cnn",
    "pool": 1,
    "train_size": 10_000,
    "validation_size": 2_000,
    "validation_included": False,
    "test_size": None,
    "epochs": 8,
    "batch_size": 128,
    "augment": False,
    "inverse_every": 20,
    "targets": [85.0, 87.0],
    "trial_size": 5_000,
    "trial_epochs": 2,
}
CIFAR: Settings = {**FASHION, "data": "cifar10", "model": "resnet20", "pool": 2, "epochs": 6, "targets": [50.0, 60.0]}
PAPER: Settings = {
    **CIFAR,
    "pool": 1,
    "train_size": None,
    "validation_size": 5_000,
    "validation_included": True,
    "epochs": 100,
    "augment": True,
    "inverse_every": 100,
    "trial_size": None,
    "trial_epochs": 10,
}
SMALL: Settings = {
    "tasks": {"fashion-mnist": FASHION, "cifar10": CIFAR},
    "methods": METHODS,
    "long": ["sgd"],
    "trials": 6,
    "seeds": [0, 1, 2],
}
FULL: Settings = {
    **SMALL,
    "tasks": {
        "cifar10-resnet32": {**PAPER, "model": "resnet32", "targets": [90.0, 92.0]},
        "cifar10-resnet110": {**PAPER, "model": "resnet110", "targets": [92.0, 93.5]},
    },
}
DIGITS: Settings = {
    **FASHION,
    "data": "digits",
    "train_size": 1_000,
    "validation_size": 200,
    "epochs": 2,
    "inverse_every": 4,
    "targets": [50.0, 80.0],
    "trial_size": 500,
    "trial_epochs": 1,
}
SMOKE: Settings = {**SMALL, "tasks": {"digits": DIGITS}, "trials": 2, "seeds": [0]}


def units(settings: Settings) -> list[str]:
    """All trials, then the runs; seeds outermost, so that an interrupted experiment is complete for the first ones."""
    names = [
        f"tune/{task}/{method}/{number}"
        for task in settings["tasks"]
        for method in settings["methods"]
        for number in range(settings["trials"])
    ]
    runs = [*settings["methods"], *(f"{method}-long" for method in settings["long"])]
    return names + [
        f"{task}/{method}/seed={seed}" for seed in settings["seeds"] for task in settings["tasks"] for method in runs
    ]


def splits(task: Settings, context: Context, *, tuning_split: bool) -> tuple[data.Split, data.Split]:
    """Returns what is trained on and what is tested on: the test images, or for a trial the validation images."""
    dataset = _load(task["data"], context.data_dir)
    train_images, held = dataset.train, task["validation_size"]
    rest = len(train_images.labels) - (held if tuning_split or not task["validation_included"] else 0)
    size = task["trial_size" if tuning_split else "train_size"] or rest
    if not 0 < size <= rest:
        raise ValueError(f"{size} training images of {task['data']}; there are {rest} beside the validation images")
    tested = _part(train_images, -held, None) if tuning_split else _part(dataset.test, 0, task["test_size"])
    return _pooled(_part(train_images, 0, size), task["pool"]), _pooled(tested, task["pool"]).to(context.device)


@lru_cache(maxsize=1)
def _load(name: str, data_dir: Path | None) -> data.Dataset:
    """Read once for all units of a command."""
    return data.load(name, data_dir)


def run(unit: str, settings: Settings, context: Context) -> Result:
    """Trains. Returns "options", "parameters", "epochs" (figures by epoch, see `experiments.runs`) and "diverged"."""
    trial = unit.startswith("tune/")
    task_name, method, number = unit.removeprefix("tune/").split("/")
    task, base = settings["tasks"][task_name], method.removesuffix("-long")
    if trial:
        seed, options = TRIAL_SEED, tuning.trials(base, "images", settings["trials"])[int(number)]
    else:
        seed = int(number.removeprefix("seed="))
        options = tuning.best(tuning.finished(context), f"tune/{task_name}/{base}/", figure="accuracy")
    trained, tested = splits(task, context, tuning_split=trial)
    config = Config(batch_size=task["batch_size"], device=context.device, augment=task["augment"])
    epochs = task["trial_epochs"] if trial else task["epochs"] * (2 if method != base else 1)
    steps = math.ceil(len(trained.labels) / config.batch_size)
    size, channels = trained.images.shape[-1], trained.images.shape[1]
    model = build_model(task["model"], size=size, channels=channels, classes=data.CLASSES[task["data"]], seed=seed)
    model.to(context.device)
    plan = Plan(
        model,
        tuning.optimiser(base).build(model, tuning.Training(steps, inverse_every=task["inverse_every"]), options),
        batches=lambda epoch: loop.batches(trained, config, seed, epoch),
        loss=lambda batch: _loss(model, batch),
        factor=lambda step: SCHEDULES["step"](step / (epochs * steps)),
        test=lambda: _test(model, tested),
        epochs=epochs,
        steps=steps,
        seed=seed,
    )
    parameters = sum(p.numel() for p in model.parameters())
    return {"options": options, "parameters": parameters, "steps": steps, **train(plan, context)}


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    images, labels = batch
    return F.cross_entropy(model(images), labels), len(labels)


def _test(model: nn.Module, split: data.Split) -> dict[str, float]:
    loss, accuracy = loop.evaluate(model, split)
    return {"loss": loss, "accuracy": accuracy}


def _part(split: data.Split, first: int, end: int | None) -> data.Split:
    return data.Split(split.images[first:end], split.labels[first:end])


def _pooled(split: data.Split, pool: int) -> data.Split:
    return split if pool == 1 else data.Split(F.avg_pool2d(split.images, pool), split.labels)


EXPERIMENT = Experiment(
    name="images",
    help="epochs and seconds to a target accuracy, final accuracy, tuned alike",
    source="FNGD paper, Table II and Fig. 5–6",
    scales={"small": SMALL, "full": FULL, "smoke": SMOKE},
    units=units,
    run=run,
    report=report,
    draw=draw,
    claims=CLAIMS,
    needs=("sklearn",),
    growing=("seeds", "methods", "long"),
)
