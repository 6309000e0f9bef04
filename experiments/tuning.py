"""The optimisers of the training experiments, and how each is tuned.

Every method gets the same number of trials: a grid that is declared here, before any recorded trial. A trial is a short
run on part of the training set with a seed of its own, judged on samples that no run trains on; test data are not
looked at. What is the best trial's goes into all seeds of a method. Where the best trial lies at the edge of its grid
the tables say so.

Everything that is not in the grid is the FNGD paper's, or that of the method's own paper: momentum 0.9, weight decay
5e-4 on images and 0 in translation (AdamW: 0.01, decoupled), KFAC and Shampoo with statistics every 10 steps and
inverses about four times an epoch (in the paper every 100 steps), Eva's statistics in every step, SKFAC refreshed 48
times an epoch, KL clip 0.001 for KFAC, SKFAC and Eva. Layers without weight matrix take the plain gradient, and so do,
with KFAC, SKFAC, Eva and Shampoo, embeddings and the layer before the softmax, as is usual: their factors are as wide
as the vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from experiments.record import Context, load_record
from fngd import EKFAC, FNGD, KFAC, MBF, NGD, SKFAC, Eva, HyLo, Shampoo
from fngd.training import rivals
from fngd.training.recipes import default_rate, optimizer_spec
from fngd.training.rivals import MuonAndAdamW
from fngd.training.settings import Config, is_foreign

Options = dict[str, Any]
Grid = list[Options]


@dataclass(frozen=True)
class Training:
    """What an optimiser must know of its run."""

    steps: int  # in an epoch
    weight_decay: float = 5e-4
    statistics_every: int = 10
    inverse_every: int = 100
    plain: tuple[str, ...] = ()  # modules that factored methods leave alone


def _groups(model: nn.Module, training: Training) -> list[dict[str, Any]]:
    """All parameters; those of `training.plain` in a group that is not preconditioned."""
    plain = {id(p) for path in training.plain for p in model.get_submodule(path).parameters()}
    groups = [
        {"params": [p for p in model.parameters() if (id(p) in plain) == left_alone], "precondition": not left_alone}
        for left_alone in (False, True)
    ]
    return [group for group in groups if group["params"]]


def _common(training: Training) -> Options:
    return {"momentum": 0.9, "weight_decay": training.weight_decay}


def _sgd(model: nn.Module, training: Training, options: Options) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **_common(training), **options)


def _adamw(model: nn.Module, training: Training, options: Options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), weight_decay=0.01, **options)


def _transformer_adamw(model: nn.Module, training: Training, options: Options) -> torch.optim.Optimizer:
    # Vaswani et al. (2017), Section 5.3.
    return torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98), eps=1e-9, **options)


def _ngd(model: nn.Module, training: Training, options: Options) -> torch.optim.Optimizer:
    return NGD(model, **_common(training), **options)


def _fngd(model: nn.Module, training: Training, options: Options) -> torch.optim.Optimizer:
    return FNGD(model, steps_per_epoch=training.steps, **_common(training), **options)


def _per_layer(model: nn.Module, training: Training, options: Options) -> torch.optim.Optimizer:
    return _fngd(model, training, {"scale": "per_layer", **options})


def _kfac(model: nn.Module, training: Training, options: Options) -> torch.optim.Optimizer:
    every: Options = {"statistics_every": training.statistics_every, "inverse_every": training.inverse_every}
    return KFAC(model, _groups(model, training), **every, **_common(training), **options)


def _ekfac(model: nn.Module, training: Training, options: Options) -> torch.optim.Optimizer:
    every: Options = {"statistics_every": training.statistics_every, "inverse_every": training.inverse_every}
    return EKFAC(model, _groups(model, training), **every, **_common(training), **options)


def _mbf(model: nn.Module, training: Training, options: Options) -> torch.optim.Optimizer:
    every: Options = {"statistics_every": training.statistics_every, "inverse_every": training.inverse_every}
    return MBF(model, _groups(model, training), **every, **_common(training), **options)


def _hylo(model: nn.Module, training: Training, options: Options) -> torch.optim.Optimizer:
    every = training.inverse_every
    common = _common(training)
    return HyLo(model, _groups(model, training), steps_per_epoch=training.steps, every=every, **common, **options)


def _muon(model: nn.Module, training: Training, options: Options) -> torch.optim.Optimizer:
    return MuonAndAdamW(model, **options)


def _soap(model: nn.Module, training: Training, options: Options) -> torch.optim.Optimizer:
    return rivals.soap(model, options["lr"], Config(), training.steps)


def _skfac(model: nn.Module, training: Training, options: Options) -> torch.optim.Optimizer:
    every = max(1, training.steps // 48)
    return SKFAC(model, _groups(model, training), every=every, **_common(training), **options)


def _eva(model: nn.Module, training: Training, options: Options) -> torch.optim.Optimizer:
    return Eva(model, _groups(model, training), **_common(training), **options)


def _shampoo(model: nn.Module, training: Training, options: Options) -> torch.optim.Optimizer:
    every: Options = {"statistics_every": training.statistics_every, "inverse_every": training.inverse_every}
    return Shampoo(_groups(model, training), **every, **_common(training), **options)


@dataclass(frozen=True)
class Optimiser:
    """How to build a method, its trials by kind of task, and its schedule where it is not the task's."""

    build: Callable[[nn.Module, Training, Options], torch.optim.Optimizer]
    label: str
    images: Grid
    translation: Grid
    schedule: str | None = None


def grid(**values: list[float]) -> Grid:
    """Returns all combinations.

    >>> grid(lr=[0.1, 0.2], damping=[0.03])
    [{'lr': 0.1, 'damping': 0.03}, {'lr': 0.2, 'damping': 0.03}]
    """
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


_RATES = [0.1, 0.05, 0.2, 0.02, 0.5, 0.01]
_TEXT_RATES = [0.1, 0.03, 0.3, 0.01]
_ADAM_RATES = [2e-3, 1e-3, 5e-3, 5e-4, 1e-2, 2e-4]
_TEXT_ADAM_RATES = [1e-3, 3e-4, 3e-3, 1e-4]
_FACTORED = grid(damping=[0.03, 0.003], lr=[0.1, 0.03, 0.3])
_TEXT_FACTORED = grid(damping=[0.03, 0.003], lr=[0.1, 0.3])
_ALPHA = grid(alpha=[1e-2, 1e-3], lr=[0.1, 0.05, 0.3])
_TEXT_ALPHA = grid(alpha=[1e-2, 1e-3], lr=[0.1, 0.3])
_PER_LAYER = grid(alpha=[1e-2], lr=[1e-2, 1e-3, 1e-1, 1e-4, 1.0, 1e-5])
_TEXT_PER_LAYER = grid(alpha=[1e-2], lr=[1e-2, 1e-3, 1e-1, 1e-4])

OPTIMISERS: dict[str, Optimiser] = {
    "sgd": Optimiser(_sgd, "SGD", grid(lr=_RATES), grid(lr=_TEXT_RATES)),
    "adamw": Optimiser(_adamw, "AdamW", grid(lr=_ADAM_RATES), grid(lr=_TEXT_ADAM_RATES)),
    "adamw-warmup": Optimiser(
        _transformer_adamw, "AdamW, warm-up", [], grid(lr=[2e-3, 1e-3, 4e-3, 5e-4]), "inverse root"
    ),
    "kfac": Optimiser(_kfac, "KFAC", _FACTORED, _TEXT_FACTORED),
    "shampoo": Optimiser(_shampoo, "Shampoo", grid(lr=_RATES), grid(lr=_TEXT_RATES)),
    "eva": Optimiser(_eva, "Eva", _FACTORED, _TEXT_FACTORED),
    "ekfac": Optimiser(_ekfac, "EKFAC", _FACTORED, _TEXT_FACTORED),
    "mbf": Optimiser(_mbf, "MBF", _FACTORED, _TEXT_FACTORED),
    "hylo": Optimiser(_hylo, "HyLo", _FACTORED, _TEXT_FACTORED),
    "muon": Optimiser(_muon, "Muon", grid(lr=_ADAM_RATES), grid(lr=_TEXT_ADAM_RATES)),
    "soap": Optimiser(_soap, "SOAP", grid(lr=_ADAM_RATES), grid(lr=_TEXT_ADAM_RATES)),
    "skfac": Optimiser(_skfac, "SKFAC", _FACTORED, _TEXT_FACTORED),
    "ngd": Optimiser(_ngd, "NGD", _ALPHA, _TEXT_ALPHA),
    "fngd": Optimiser(_fngd, "FNGD", _ALPHA, _TEXT_ALPHA),
    "fngd-warmup": Optimiser(_fngd, "FNGD, warm-up", [], _TEXT_ALPHA, "inverse root"),
    "fngd-per-layer": Optimiser(_per_layer, "FNGD, 1/λ kept", _PER_LAYER, _TEXT_PER_LAYER),
}
"""`fngd` folds 1/λ into the learning rate (FNGD paper, Section IV-D); `fngd-per-layer` takes equation 9 as it stands,
so that the step of a layer is η/λ with the λ of its first epoch: the paper's "adaptive learning rate"."""


_FACTORS = [1.0, 0.5, 2.0, 0.25, 4.0, 0.125]
"""Of the default learning rate of a function of one's own, in the order in which they are tried."""


def optimiser(method: str) -> Optimiser:
    """Returns the entry of `OPTIMISERS`, or one for a function that `module:function` names.

    Such a function is called as `fngd.training.recipes` says, and is tuned over the default of its `lr`, halved and
    doubled. Raises ValueError for an unknown method, or a function whose `lr` has no default.
    """
    if method in OPTIMISERS:
        return OPTIMISERS[method]
    if not is_foreign(method):
        raise ValueError(f"method {method!r} is unknown; choose from {list(OPTIMISERS)}, or give module:function")
    spec = optimizer_spec(method)
    rate = spec.lr if spec.lr is not None else default_rate(method)

    def build(model: nn.Module, training: Training, options: Options) -> torch.optim.Optimizer:
        config = Config(weight_decay=training.weight_decay)
        return spec.build(model, options["lr"], config, training.steps)

    rates = grid(lr=[rate * factor for factor in _FACTORS])
    return Optimiser(build, method, rates, rates[:4])


def trials(method: str, kind: str, count: int) -> Grid:
    """Returns the first `count` trials of a method, kind being "images" or "translation".

    Raises ValueError for an unknown method, or one that has fewer.
    """
    found: Grid = getattr(optimiser(method), kind)
    if not 1 <= count <= len(found):
        raise ValueError(f"{count} trials of {method!r}; there are 1 … {len(found)} for {kind}")
    return found[:count]


def best(results: Mapping[str, Mapping[str, Any]], prefix: str, *, figure: str, smallest: bool = False) -> Options:
    """Returns the options of the best trial, the first of equals.

    Arguments:
        results: units' results; a trial has "options", "epochs", "diverged".
        prefix: what the trials' units begin with.
        figure: of the last epoch, by which they are compared; the smaller the better if `smallest`.

    Raises ValueError where no trial is finished, or all diverged.
    """
    found = [result for unit, result in sorted(results.items()) if unit.startswith(prefix)]
    sound = [result for result in found if not result["diverged"] and result["epochs"][-1].get(figure) is not None]
    if not sound:
        what = "no trial is finished" if not found else f"all {len(found)} trials diverged"
        raise ValueError(f"{prefix}*: {what}. Trials come first: leave out --only, or add {prefix}* to it")
    sign = -1 if smallest else 1
    return dict(max(sound, key=lambda result: sign * result["epochs"][-1][figure])["options"])


def finished(context: Context) -> dict[str, dict[str, Any]]:
    """Returns what the command that a unit belongs to has finished so far, by unit."""
    path = context.checkpoint.parent.with_suffix(".json")
    return load_record(path).results if path.is_file() else {}


def at_edge(options: Options, tried: Grid) -> list[str]:
    """Names the options of which several values were tried and the best one is the smallest or the largest.

    >>> at_edge({"lr": 0.2, "alpha": 0.1}, grid(lr=[0.1, 0.2, 0.05], alpha=[0.1]))
    ['lr']
    """
    ranges = {name: {each[name] for each in tried} for name in options}
    return [n for n, values in ranges.items() if len(values) > 1 and options[n] in (min(values), max(values))]


def edges(
    results: Mapping[str, Mapping[str, Any]],
    methods: Sequence[str],
    prefix: str,
    *,
    figure: str,
    smallest: bool = False,
) -> dict[str, list[str]]:
    """Returns for each method with trials the options whose best value is at the edge; as for `table`."""
    found = {}
    for method in methods:
        own = f"{prefix}{method}/"
        tried = [dict(result["options"]) for unit, result in sorted(results.items()) if unit.startswith(own)]
        if not tried:
            continue
        with suppress(ValueError):  # all of its trials diverged, so that there is no winner
            found[method] = at_edge(best(results, own, figure=figure, smallest=smallest), tried)
    return found


def in_words(options: Options) -> str:
    """Returns options as text.

    >>> in_words({"lr": 0.1, "alpha": 0.01})
    'lr 0.1, alpha 0.01'
    """
    return ", ".join(f"{name} {value:g}" for name, value in options.items())


def table(
    results: Mapping[str, Mapping[str, Any]],
    methods: Sequence[str],
    prefix: str,
    *,
    figure: str,
    smallest: bool = False,
    digits: int = 1,
) -> str:
    """Returns all trials and what was chosen as a Markdown table; as for `best`, but prefix is without the method."""
    rows = ["| method | trials | chosen |", "| --- | --- | --- |"]
    for method in methods:
        found = {unit: each for unit, each in sorted(results.items()) if unit.startswith(f"{prefix}{method}/")}
        if not found:
            continue
        cells = [f"{in_words(each['options'])}: {_outcome(each, figure, digits)}" for each in found.values()]
        try:
            options = best(results, f"{prefix}{method}/", figure=figure, smallest=smallest)
        except ValueError:
            chosen = "none: all diverged"
        else:
            edge = at_edge(options, [each["options"] for each in found.values()])
            chosen = in_words(options) + (f" (edge of the grid: {', '.join(edge)})" if edge else "")
        rows.append(f"| {method} | {'; '.join(cells)} | {chosen} |")
    return "\n".join(rows)


def _outcome(result: Mapping[str, Any], figure: str, digits: int) -> str:
    value = None if result["diverged"] else result["epochs"][-1].get(figure)
    return "diverged" if value is None else f"{value:.{digits}f}"
