"""Options that NGD and FNGD share: for type checkers, and for signatures that show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from torch import Tensor

from fngd.natural.adaptive_damping import AdaptiveDamping
from persample.reweighting import BatchAxis


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
