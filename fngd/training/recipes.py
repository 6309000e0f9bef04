"""What `python -m fngd compare` trains with: registries of optimisers and schedules, and functions of one's own.

`my.module:make` names a function, or a class, that is called with the model and with those of the keywords `lr`,
`config` and `steps_per_epoch` that it has; `lr` only where one is given, so a default of its own stands. A class of
optimisers that takes parameters (its first argument is called `params`) gets the model's. It returns a
`torch.optim.Optimizer`; what that may ask of the loop is said in `fngd.training.steps`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from fngd.kronecker.ekfac import EKFAC
from fngd.kronecker.eva import Eva
from fngd.kronecker.hylo.hylo import HyLo
from fngd.kronecker.kfac import KFAC
from fngd.kronecker.mbf import MBF
from fngd.kronecker.skfac import SKFAC
from fngd.natural.fngd import FNGD
from fngd.natural.ngd import NGD
from fngd.shampoo import Shampoo
from fngd.training import rivals, settings
from fngd.training.settings import Config


@dataclass(frozen=True)
class OptimizerSpec:
    """How to build an optimiser for a model, and its learning rate unless one is given; None: the function's own."""

    build: Callable[[nn.Module, Any, Config, int], torch.optim.Optimizer]
    lr: float | None
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


def _ekfac(model: nn.Module, lr: float, config: Config, steps_per_epoch: int) -> torch.optim.Optimizer:
    return EKFAC(model, lr=lr, weight_decay=config.weight_decay, statistics_every=10, inverse_every=100)


def _mbf(model: nn.Module, lr: float, config: Config, steps_per_epoch: int) -> torch.optim.Optimizer:
    return MBF(model, lr=lr, weight_decay=config.weight_decay, statistics_every=10, inverse_every=100)


def _hylo(model: nn.Module, lr: float, config: Config, steps_per_epoch: int) -> torch.optim.Optimizer:
    return HyLo(model, lr=lr, weight_decay=config.weight_decay, steps_per_epoch=steps_per_epoch)


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
    "ekfac": OptimizerSpec(_ekfac, 0.05, settings.OPTIMIZERS["ekfac"]),
    "mbf": OptimizerSpec(_mbf, 0.05, settings.OPTIMIZERS["mbf"]),
    "hylo": OptimizerSpec(_hylo, 0.05, settings.OPTIMIZERS["hylo"]),
    "skfac": OptimizerSpec(_skfac, 0.05, settings.OPTIMIZERS["skfac"]),
    "eva": OptimizerSpec(_eva, 0.05, settings.OPTIMIZERS["eva"]),
    "shampoo": OptimizerSpec(_shampoo, 0.05, settings.OPTIMIZERS["shampoo"]),
    "muon": OptimizerSpec(rivals.muon, 2e-3, settings.OPTIMIZERS["muon"]),
    "soap": OptimizerSpec(rivals.soap, 3e-3, settings.OPTIMIZERS["soap"]),
    "adahessian": OptimizerSpec(rivals.adahessian, 0.01, settings.OPTIMIZERS["adahessian"]),
    "schedule-free": OptimizerSpec(rivals.schedule_free, 5e-3, settings.OPTIMIZERS["schedule-free"]),
    "fngd-permuted": OptimizerSpec(_permuted, 0.05, settings.OPTIMIZERS["fngd-permuted"]),
    "fngd-constant": OptimizerSpec(_constant, 0.05, settings.OPTIMIZERS["fngd-constant"]),
}

SCHEDULES: dict[str, Callable[[float], float]] = {
    "step": lambda progress: 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))),
    "constant": lambda progress: 1.0,
}
"""Factor on the learning rate by progress 0 … 1; "step" is the paper's: × 0.1 at 50 % and 75 %."""


def optimizer_spec(name: str) -> OptimizerSpec:
    """Returns the entry of `OPTIMIZERS`, or one made of the function that `module:function` names.

    Raises ValueError where there is neither, with what was looked for.

    >>> optimizer_spec("torch.optim:NAdam").help
    'torch.optim:NAdam'
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if not settings.is_foreign(name):
        raise ValueError(f"{name}: unknown here; choose from {', '.join(OPTIMIZERS)}, or give module:function")
    found = _imported(name)
    if isinstance(found, OptimizerSpec):
        return found
    if not callable(found):
        raise ValueError(f"{name} is a {type(found).__name__}; it must be a function of the model, or a class")
    return OptimizerSpec(_foreign(name, found), None, name)


def default_rate(name: str) -> float:
    """Returns the default of the `lr` of the function that `module:function` names; ValueError where it has none.

    >>> default_rate("torch.optim:NAdam")
    0.002
    """
    parameter = inspect.signature(_imported(name)).parameters.get("lr")
    if parameter is None or not isinstance(parameter.default, int | float):
        raise ValueError(f"{name}: its lr has no default, around which to try rates; give it one, as lr=0.1")
    return float(parameter.default)


def _imported(name: str) -> Any:
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{name} cannot be imported: {error}. Modules are looked for in the folder that the command runs in, and "
            "where Python finds its packages"
        ) from error


def _foreign(name: str, make: Callable[..., Any]) -> Callable[[nn.Module, Any, Config, int], torch.optim.Optimizer]:
    parameters = list(inspect.signature(make).parameters.values())
    keywords = {each.name for each in parameters[1:]}
    passes_on = any(each.kind is each.VAR_KEYWORD for each in parameters)
    takes_params = isinstance(make, type) and bool(parameters) and parameters[0].name == "params"

    def build(model: nn.Module, lr: float | None, config: Config, steps_per_epoch: int) -> torch.optim.Optimizer:
        if lr is not None and "lr" not in keywords and not passes_on:
            raise ValueError(
                f"--lr {name}={lr:g} is given, but {name} takes no lr; its keywords are {sorted(keywords)}"
            )
        offered = {"config": config, "steps_per_epoch": steps_per_epoch}
        options = {key: value for key, value in offered.items() if key in keywords}
        if lr is not None:
            options["lr"] = lr
        there = {each.name for each in parameters[1:] if each.default is not each.empty} | options.keys()
        lacking = [
            e.name for e in parameters[1:] if e.name not in there and e.kind not in (e.VAR_POSITIONAL, e.VAR_KEYWORD)
        ]
        if lacking:
            raise ValueError(
                f"{name} needs {', '.join(lacking)}; it is called with the model and what it takes of lr (by --lr "
                f"{name}=X), config and steps_per_epoch. Give the others defaults"
            )
        made = make(model.parameters() if takes_params else model, **options)
        if not isinstance(made, torch.optim.Optimizer):
            raise ValueError(f"{name} has returned a {type(made).__name__}; it must return a torch.optim.Optimizer")
        return made

    return build


def build_optimizer(
    name: str, model: nn.Module, config: Config, *, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Returns the optimiser and its schedule, which is to be stepped after every batch."""
    spec = optimizer_spec(name)
    optimizer = spec.build(model, dict(config.lr).get(name, spec.lr), config, steps_per_epoch)
    total, factor = config.epochs * steps_per_epoch, SCHEDULES[config.schedule]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / total))
