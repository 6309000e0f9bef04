"""Damping λ of a Gauss–Newton step: fixed, scheduled, or adapted by gain ratio and step size.

ρ = (L(θ) − L(θ − t·d)) / (L(θ) − ½‖s − t·J d‖²)      the gain ratio (Marquardt 1963; Nocedal & Wright, ch. 4)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fngd.coefficients import is_number

ADAPTIVE = "adaptive"


@dataclass(frozen=True)
class Adaptive:
    """Levenberg–Marquardt with a line search: λ starts small, rises after tiny or badly predicted steps, else falls.

    Without a search λ has to be so large that full steps succeed. With one that is too much: the step that is best
    now lowers what is stiff and leaves what is soft, where a small λ with a short step lowers all residuals alike and
    is ahead some steps later. So steps count as good from t = `full` on, and as bad only below t = `short`.

    Arguments:
        initial: λ of the first step over tr K, K = J Jᵀ.
        decrease: least factor on λ where ρ > `good` and t ≥ `full`, in (0, 1].
        increase: factor where ρ < `poor` or t < `short`, > 1; the gain ratio of a tiny step is near 1 whatever λ is.
        good, poor: bounds of the gain ratio, 0 ≤ poor ≤ good.
        full, short: bounds of the step size, 0 < short ≤ full ≤ 1.
        low, high: λ stays between these multiples of tr K.
    """

    initial: float = 1e-8
    decrease: float = 0.1
    increase: float = 4.0
    good: float = 0.25
    poor: float = 0.05
    full: float = 0.25
    short: float = 1 / 128
    low: float = 1e-15
    high: float = 1e3

    def __post_init__(self) -> None:
        sound = {
            "0 < low ≤ initial ≤ high": 0 < self.low <= self.initial <= self.high < math.inf,
            "0 < decrease ≤ 1 < increase": 0 < self.decrease <= 1 < self.increase < math.inf,
            "0 ≤ poor ≤ good": 0 <= self.poor <= self.good,
            "0 < short ≤ full ≤ 1": 0 < self.short <= self.full <= 1,
        }
        broken = [rule for rule, holds in sound.items() if not holds]
        if broken:
            raise ValueError(f"{self}: {' and '.join(broken)} must hold")

    def within(self, damping: float | None, trace: float) -> float:
        """Returns λ for a point where K has this trace: `damping`, None at first, between the limits.

        >>> Adaptive().within(None, 2.0), Adaptive(low=1e-8).within(1e-9, 2.0)
        (2e-08, 2e-08)
        """
        wanted = self.initial * trace if damping is None else damping
        return min(max(wanted, self.low * trace), self.high * trace)

    def next(self, damping: float, gain: float, step: float = 1.0, left: float = 0.0) -> float:
        """Returns λ for the next step, from this one's, its gain ratio and size; NaN and −inf count as poor.

        `left`: the part of the loss that the step has left. After a step shorter than 2·`full` λ falls no faster than
        the norm of the residuals: else it is soon so small that steps stay short.

        >>> [Adaptive().next(1.0, gain, step) for gain, step in ((0.9, 1.0), (0.9, 0.125), (0.9, 0.004), (0.0, 1.0))]
        [0.1, 1.0, 4.0, 4.0]
        """
        if not gain >= self.poor or step < self.short:
            return damping * self.increase
        if gain <= self.good or step < self.full:
            return damping
        slowest = 0.0 if step >= min(1.0, 2 * self.full) else math.sqrt(left)
        return damping * max(self.decrease, slowest)


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
    if not is_number(given) or not 0 <= given < math.inf:
        raise ValueError(
            f"damping={given!r}; it must be ≥ 0 and finite (1e-8 is a start for float64, 1e-3 for noisy data)"
        )
    return float(given)
