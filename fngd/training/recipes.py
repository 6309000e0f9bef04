"""What `python -m fngd compare` trains with: settings, and registries of optimisers and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from fngd.kronecker.eva import Eva
from fngd.kronecker.kfac import KFAC
from fngd.kronecker.skfac import SKFAC
from fngd.natural.fngd import FNGD
from fngd.natural.ngd import NGD
from fngd.shampoo import Shampoo


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


@dataclass(frozen=True)
class OptimizerSpec:
    """How to build an optimiser for a model, and its learning rate unless one is given."""

    build: Callable[[nn.Module, float, Config, int], torch.optim.Optimizer]
    lr: float
    help: str


def _sgd(model: nn.Module, lr: float, config: Config, steps_per_epoch: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=config.weight_decay)


def _adamw(model: nn.Module, lr: float, config: Config, steps_per_epoch: int) -> torch.optim.Optimizer:
    # Decoupled: what SGD's weight decay does per unit of its learning rate is far less in AdamW's.
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)


def _ngd(model: nn.Module, lr: float, config: Config, steps_per_epoch: int) -> torch.optim.Optimizer:
    return NGD(model, lr=lr, momentum=0.9, weight_decay=config.weight_decay, alpha=config.alpha)


def _fngd(
    model: nn.Module, lr: float, config: Config, steps_per_epoch: int, control: str | None = None
) -> torch.optim.Optimizer:
    return FNGD(
        model,
        lr=lr,
        momentum=0.9,
        weight_decay=config.weight_decay,
        alpha=config.alpha,
        steps_per_epoch=steps_per_epoch,
        control=control,
    )


def _permuted(model: nn.Module, lr: float, config: Config, steps_per_epoch: int) -> torch.optim.Optimizer:
    return _fngd(model, lr, config, steps_per_epoch, "permuted")


def _constant(model: nn.Module, lr: float, config: Config, steps_per_epoch: int) -> torch.optim.Optimizer:
    return _fngd(model, lr, config, steps_per_epoch, "constant")


def _kfac(model: nn.Module, lr: float, config: Config, steps_per_epoch: int) -> torch.optim.Optimizer:
    return KFAC(model, lr=lr, weight_decay=config.weight_decay, statistics_every=10, inverse_every=100)


def _skfac(model: nn.Module, lr: float, config: Config, steps_per_epoch: int) -> torch.optim.Optimizer:
    # As published: refreshed about 48 times an epoch.
    return SKFAC(model, lr=lr, weight_decay=config.weight_decay, every=max(1, steps_per_epoch // 48))


def _eva(model: nn.Module, lr: float, config: Config, steps_per_epoch: int) -> torch.optim.Optimizer:
    return Eva(model, lr=lr, weight_decay=config.weight_decay)


def _shampoo(model: nn.Module, lr: float, config: Config, steps_per_epoch: int) -> torch.optim.Optimizer:
    return Shampoo(model.parameters(), lr=lr, weight_decay=config.weight_decay)


OPTIMIZERS = {
    "sgd": OptimizerSpec(_sgd, 0.05, "SGD with momentum 0.9"),
    "adamw": OptimizerSpec(_adamw, 2e-3, "AdamW, weight decay 0.01"),
    "ngd": OptimizerSpec(_ngd, 0.05, "natural gradient, coefficients computed in every step"),
    "fngd": OptimizerSpec(_fngd, 0.05, "natural gradient, coefficients shared across epochs"),
    "kfac": OptimizerSpec(_kfac, 0.05, "KFAC, statistics every 10 steps, decompositions every 100"),
    "skfac": OptimizerSpec(_skfac, 0.05, "SKFAC with Reduce Sum, refreshed 48 times an epoch"),
    "eva": OptimizerSpec(_eva, 0.05, "Eva, vectors updated in every step"),
    "shampoo": OptimizerSpec(_shampoo, 0.05, "Shampoo grafted on SGD, statistics every 10 steps, roots every 100"),
    "fngd-permuted": OptimizerSpec(_permuted, 0.05, "control: FNGD with permuted coefficients"),
    "fngd-constant": OptimizerSpec(_constant, 0.05, "control: FNGD's code with SGD's coefficients"),
}

SCHEDULES: dict[str, Callable[[float], float]] = {
    "step": lambda progress: 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))),
    "constant": lambda progress: 1.0,
}
"""Factor on the learning rate by progress 0 … 1; "step" is the paper's: × 0.1 at 50 % and 75 %."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {},
    "cifar10": {"model": "resnet20", "epochs": 10, "batch_size": 128},
    "fashion-mnist": {"model": "cnn", "epochs": 10, "batch_size": 128},
}
"""Where a data set's defaults differ from those of `Config`."""


def build_optimizer(
    name: str, model: nn.Module, config: Config, *, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Returns the optimiser and its schedule, which is to be stepped after every batch."""
    spec = OPTIMIZERS[name]
    optimizer = spec.build(model, dict(config.lr).get(name, spec.lr), config, steps_per_epoch)
    total, factor = config.epochs * steps_per_epoch, SCHEDULES[config.schedule]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / total))
