"""What `python -m fngd compare` trains with: registries of optimisers and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fngd.kronecker.eva import Eva
from fngd.kronecker.kfac import KFAC
from fngd.kronecker.skfac import SKFAC
from fngd.natural.fngd import FNGD
from fngd.natural.ngd import NGD
from fngd.shampoo import Shampoo
from fngd.training import settings
from fngd.training.settings import Config


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
    "sgd": OptimizerSpec(_sgd, 0.05, settings.OPTIMIZERS["sgd"]),
    "adamw": OptimizerSpec(_adamw, 2e-3, settings.OPTIMIZERS["adamw"]),
    "ngd": OptimizerSpec(_ngd, 0.05, settings.OPTIMIZERS["ngd"]),
    "fngd": OptimizerSpec(_fngd, 0.05, settings.OPTIMIZERS["fngd"]),
    "kfac": OptimizerSpec(_kfac, 0.05, settings.OPTIMIZERS["kfac"]),
    "skfac": OptimizerSpec(_skfac, 0.05, settings.OPTIMIZERS["skfac"]),
    "eva": OptimizerSpec(_eva, 0.05, settings.OPTIMIZERS["eva"]),
    "shampoo": OptimizerSpec(_shampoo, 0.05, settings.OPTIMIZERS["shampoo"]),
    "fngd-permuted": OptimizerSpec(_permuted, 0.05, settings.OPTIMIZERS["fngd-permuted"]),
    "fngd-constant": OptimizerSpec(_constant, 0.05, settings.OPTIMIZERS["fngd-constant"]),
}

SCHEDULES: dict[str, Callable[[float], float]] = {
    "step": lambda progress: 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))),
    "constant": lambda progress: 1.0,
}
"""Factor on the learning rate by progress 0 … 1; "step" is the paper's: × 0.1 at 50 % and 75 %."""


def build_optimizer(
    name: str, model: nn.Module, config: Config, *, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Returns the optimiser and its schedule, which is to be stepped after every batch."""
    spec = OPTIMIZERS[name]
    optimizer = spec.build(model, dict(config.lr).get(name, spec.lr), config, steps_per_epoch)
    total, factor = config.epochs * steps_per_epoch, SCHEDULES[config.schedule]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / total))
