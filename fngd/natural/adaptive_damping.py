"""Damping that follows how well the quadratic model predicts the loss: the Levenberg–Marquardt rule.

    M(δ) − M(0) = gᵀδ + ½ δᵀ(F + λI)δ             the model's change of the loss by the step δ
    ρ = (h(θ + δ) − h(θ)) / (M(δ) − M(0))          of the actual change; h on the batch that made δ
    λ ← ω^T·λ if ρ > 3/4,    λ ← λ/ω^T if ρ < 1/4,    every T steps    (Martens and Grosse 2015, Section 6.5)

ω = 19/20 and T = 5 are theirs, and M carries the damping as theirs does. δ is what really was added to the
parameters, with momentum, weight decay and clipping in it. F is the matrix of the direction (block-diagonal by layer,
or one block with gram="network"); parameters that are not preconditioned have F + λI = 0 here: gᵀδ alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fngd.natural.solve.directions import Pair, dot, inner_products
from persample import LayerGrads


@dataclass(frozen=True)
class AdaptiveDamping:
    """The rule that changes the damping; the factor it finds multiplies `alpha` or `damping`.

    Arguments:
        every: T, steps from one adaptation to the next, ≥ 1.
        decay: ω, in (0, 1); each adaptation multiplies or divides by ω^T.
        low, high: thresholds on ρ, low < high.
        smallest, largest: bounds of the factor, 0 < smallest ≤ 1 ≤ largest.

    Raises ValueError for an argument out of range.

    >>> AdaptiveDamping(every=1).updated(1.0, ratio=0.9)
    0.95
    """

    every: int = 5
    decay: float = 19 / 20
    low: float = 0.25
    high: float = 0.75
    smallest: float = 1e-8
    largest: float = 1e8

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every={self.every!r}; it must be a whole number of at least 1, counted in steps")
        if not 0 < self.decay < 1:
            raise ValueError(f"decay={self.decay}; it must be in (0, 1)")
        if not self.low < self.high:
            raise ValueError(f"low={self.low} and high={self.high}; low must be less than high")
        if not 0 < self.smallest <= 1 <= self.largest:
            raise ValueError(
                f"smallest={self.smallest} and largest={self.largest}; they must have 0 < smallest ≤ 1 ≤ largest"
            )

    def updated(self, factor: float, ratio: float) -> float:
        """Returns the new factor. A ratio that is NaN or inf (the loss is) counts as a bad prediction.

        >>> AdaptiveDamping(every=1, decay=0.5).updated(1.0, ratio=float("nan"))
        2.0
        """
        if not math.isfinite(ratio) or ratio < self.low:
            factor = factor / self.decay**self.every
        elif ratio > self.high:
            factor = factor * self.decay**self.every
        return min(max(factor, self.smallest), self.largest)


@dataclass(frozen=True)
class Model:
    """The quadratic model of one block of layers: the gradient of the loss, and F = SSᵀ/B times `weight`.

    Arguments:
        plain: g of each layer.
        grads: the columns of S, as LayerGrads.
        multiple: what turns them into the samples' own gradients.
        damping: λ.
        weight: of the curvature in the loss: 1 for a mean, B for a sum.
    """

    plain: Mapping[str, Pair]
    grads: Mapping[str, LayerGrads]
    multiple: Tensor
    damping: Tensor
    weight: float

    def change(self, delta: Mapping[str, Pair]) -> Tensor:
        """Returns M(δ) − M(0) for the steps of the block's layers, a tensor of no axes."""
        products = torch.stack([inner_products(self.grads[path], step) for path, step in delta.items()]).sum(0)
        curvature = (products.double() * self.multiple).square().mean()
        length = torch.stack([dot(step, step).double() for step in delta.values()]).sum()
        linear = torch.stack([dot(self.plain[path], step).double() for path, step in delta.items()]).sum()
        return linear + 0.5 * self.weight * (curvature + self.damping * length)
