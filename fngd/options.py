"""Options that NGD and FNGD, or KFAC, SKFAC and Eva, share: for type checkers, and for signatures that show them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, TypeVar

from torch import Tensor

from fngd.adaptive import AdaptiveDamping
from persample.reweight import BatchAxis

Function = TypeVar("Function", bound=Callable[..., Any])


class Options(TypedDict, total=False):
    """Keyword arguments of `NGD`, which explains them and has their defaults."""

    lr: float | Tensor
    momentum: float
    nesterov: bool
    weight_decay: float
    decoupled_weight_decay: bool
    alpha: float | None
    damping: float | None
    adapt_damping: AdaptiveDamping | None
    scale: str
    reduction: str
    fisher: str
    gram: str
    accumulate: str
    kl_clip: float | None
    other: str
    other_options: Mapping[str, Any] | None
    output_axis: int
    scaler: Any
    process_group: Any
    diagnostics: bool
    batch_axis: BatchAxis | None
    functions: bool
    foreach: bool | None


class LayerOptions(TypedDict, total=False):
    """Keyword arguments that `KFAC`, `SKFAC` and `Eva` share; `KFAC` explains them, `LayerPreconditioned` defaults."""

    lr: float | Tensor
    momentum: float
    nesterov: bool
    weight_decay: float
    decoupled_weight_decay: bool
    damping: float
    kl_clip: float | None
    reduction: str
    other: str
    other_options: Mapping[str, Any] | None
    scaler: Any
    process_group: Any
    batch_axis: BatchAxis | None
    functions: bool


def showing(options_of: Callable[..., Any]) -> Callable[[Function], Function]:
    """Returns a decorator: `help()` and `inspect.signature` show another function's keywords, not `**options`."""

    def decorate(function: Function) -> Function:
        own = inspect.signature(function)
        kept = {name: p for name, p in own.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
        shown = inspect.signature(options_of).parameters
        more = [p for name, p in shown.items() if p.kind is inspect.Parameter.KEYWORD_ONLY and name not in kept]
        function.__signature__ = own.replace(parameters=[*kept.values(), *more])  # type: ignore[attr-defined]
        return function

    return decorate
