"""What the commands are told: names to choose from, settings and their defaults. Does without torch.

The names stand here with their help, and what they stand for in `recipes`, `models` and `data`, so that options can be
read before torch is imported.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

OPTIMIZERS = {
    "sgd": "SGD with momentum 0.9",
    "adamw": "AdamW, weight decay 0.01",
    "ngd": "natural gradient, coefficients computed in every step",
    "fngd": "natural gradient, coefficients shared across epochs",
    "kfac": "KFAC, statistics every 10 steps, decompositions every 100",
    "ekfac": "EKFAC, squared gradients every 10 steps, their basis every 100",
    "mbf": "MBF, statistics every 10 steps, inverses every 100",
    "hylo": "HyLo, a tenth of the samples, selected anew every 100 steps",
    "skfac": "SKFAC with Reduce Sum, refreshed 48 times an epoch",
    "eva": "Eva, vectors updated in every step",
    "shampoo": "Shampoo grafted on SGD, statistics every 10 steps, roots every 100",
    "muon": "torch.optim.Muon for hidden matrices, AdamW for the rest",
    "soap": "SOAP, eigenbasis renewed every 10 steps (extra: rivals)",
    "adahessian": "AdaHessian (extra: rivals)",
    "schedule-free": "schedule-free AdamW; with --schedule constant (extra: rivals)",
    "fngd-permuted": "control: FNGD with permuted coefficients",
    "fngd-constant": "control: FNGD's code with SGD's coefficients",
}

MODELS = {
    "mlp": "two hidden layers of 128",
    "cnn": "two convolutions of 16 and 32 channels",
    "resnet20": "ResNet-20 with BatchNorm",
    "resnet32": "ResNet-32 with BatchNorm",
    "resnet110": "ResNet-110 with BatchNorm",
    "resnet18": "ResNet-18 with BatchNorm, 11 million",
    "resnet34": "ResNet-34 with BatchNorm, 21 million",
}

SCHEDULES = ("step", "cosine", "constant")

DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {},
    "cifar10": {"model": "resnet20", "epochs": 10, "batch_size": 128},
    "cifar100": {"model": "resnet18", "epochs": 10, "batch_size": 128},
    "fashion-mnist": {"model": "cnn", "epochs": 10, "batch_size": 128},
}
"""The data sets, and where their defaults differ from those of `Config`."""


def optimizers() -> dict[str, str]:
    """Returns the optimisers' names with their help, those included that were registered meanwhile."""
    recipes = sys.modules.get("fngd.training.recipes")
    return OPTIMIZERS if recipes is None else {name: spec.help for name, spec in recipes.OPTIMIZERS.items()}


def is_foreign(name: str) -> bool:
    """Whether a name is that of a function elsewhere, as `my.module:make`.

    >>> is_foreign("my.module:make"), is_foreign("sgd"), is_foreign("my.module:")
    (True, False, False)
    """
    module, _, function = name.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


@dataclass(frozen=True)
class Config:
    """Everything that determines the result of a comparison, but for the machine."""

    data: str = "digits"
    data_dir: str | None = None
    model: str = "cnn"
    optimizers: tuple[str, ...] = ("sgd", "adamw", "ngd", "fngd")
    epochs: int = 20
    batch_size: int = 64
    train_size: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "cpu"
    schedule: str = "step"
    lr: tuple[tuple[str, float], ...] = ()
    weight_decay: float = 5e-4
    alpha: float = 1e-2
    augment: bool = False

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as JSON knows them."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Config:
        """Returns the settings that `to_json` wrote; names that are no settings are ignored."""
        known = {field.name for field in fields(Config)}
        given = {name: _frozen(value) for name, value in values.items() if name in known}
        return replace(Config(), **given)


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(entry) for entry in value) if isinstance(value, list | tuple) else value
