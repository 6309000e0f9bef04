"""Damping λ of a Gauss–Newton step: fixed, scheduled, or adapted by how well the linear model foretells the loss.

ρ = (L(θ) − L(θ − t·d)) / (L(θ) − ½‖s − t·J d‖²)      the gain ratio (Marquardt 1963; Nocedal & Wright, ch. 4)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

ADAPTIVE = "adaptive"


@dataclass(frozen=True)
class Adaptive:
    """Levenberg–Marquardt: λ falls after steps that the model foretold well and rises after the others.

    Arguments:
        initial: λ of the first step, > 0.
        decrease: factor on λ where ρ > `good` and the full step was taken, in (0, 1].
        increase: factor where ρ < `poor`, less than a quarter of the step was taken, or none, > 1.
        good, poor: bounds of the gain ratio, 0 ≤ poor ≤ good.
        low, high: λ stays between them.
    """

    initial: float = 1e-3
    decrease: float = 0.3
    increase: float = 3.0
    good: float = 0.5
    poor: float = 0.1
    low: float = 1e-14
    high: float = 1e6

    def __post_init__(self) -> None:
        sound = {
            "0 < low ≤ initial ≤ high": 0 < self.low <= self.initial <= self.high < math.inf,
            "0 < decrease ≤ 1 < increase": 0 < self.decrease <= 1 < self.increase < math.inf,
            "0 ≤ poor ≤ good": 0 <= self.poor <= self.good,
        }
        broken = [rule for rule, holds in sound.items() if not holds]
        if broken:
            raise ValueError(f"{self}: {' and '.join(broken)} must hold")

    def next(self, damping: float, gain: float, step: float = 1.0) -> float:
        """Returns λ for the next step, from this one's, its gain ratio and size; NaN and −inf count as poor.

        The gain ratio of a tiny step is near 1 whatever λ is, so λ falls after full steps alone, and rises where
        less than a quarter of the step was taken.

        >>> Adaptive().next(1.0, 0.9), Adaptive().next(1.0, 0.3), Adaptive().next(1.0, -1.0)
        (0.3, 1.0, 3.0)
        >>> Adaptive().next(1.0, 0.9, step=0.5), Adaptive().next(1.0, 0.9, step=0.125)
        (1.0, 3.0)
        """
        if not gain >= self.poor or step < 0.25:
            factor = self.increase
        else:
            factor = self.decrease if gain > self.good and step == 1 else 1.0
        return min(max(damping * factor, self.low), self.high)


Damping = float | str | Callable[[int], float] | Adaptive


def damping_of(given: Damping) -> float | Callable[[int], float] | Adaptive:
    """Returns what a damping option stands for. Raises ValueError for another word or a number out of range."""
    if isinstance(given, str):
        if given != ADAPTIVE:
            raise ValueError(
                f"damping={given!r} is unknown; give a number ≥ 0, a function of the step, or {ADAPTIVE!r}"
            )
        return Adaptive()
    if isinstance(given, Adaptive) or callable(given):
        return given
    if not 0 <= given < math.inf:
        raise ValueError(
            f"damping={given}; it must be ≥ 0 and finite (1e-8 is a start for float64, 1e-3 for noisy data)"
        )
    return float(given)
