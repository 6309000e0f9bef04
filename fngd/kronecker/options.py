"""Options that KFAC and its kin share: for type checkers, and for signatures that show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from torch import Tensor

from persample.reweighting import BatchAxis


class LayerOptions(TypedDict, total=False):
    """Keyword arguments that layer-wise methods share; `KFAC` explains them, `LayerPreconditioned` defaults."""

    lr: float | Tensor
    momentum: float
    nesterov: bool
    weight_decay: float
    decoupled_weight_decay: bool
    damping: float
    kl_clip: float | None
    reduction: str
    curvature_samples: int | None
    other: str
    other_options: Mapping[str, Any] | None
    scaler: Any
    process_group: Any
    divide_inverses: bool
    batch_axis: BatchAxis | None
    functions: bool
