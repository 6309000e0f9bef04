"""Geodesic acceleration: a second-order correction of a Gauss–Newton direction, from one more call of the closure.

    symbol   meaning                                                               shape
    v        the change of a full step, θ − v                                      [P]
    w        second derivative of s along v, d²s(θ − τv)/dτ²                       [B]
    c        the correction; the path is θ − t·v − t²·c                            [P]

    s(θ − t·v − t²·c) = s − t·J v + t²(½w − J c) + O(t³),    c = argmin ‖J c − ½w‖² + λ‖c‖²

Narrow curved valleys, which residuals of differential equations have, allow steps of t = 1/8 and less along a line;
along the parabola they are longer, and λ falls sooner. Costs one closure call and one more solve with the same factor.
Source: Transtrum, Sethna, "Improvements to the Levenberg–Marquardt algorithm for nonlinear least-squares minimization"
(2012), whose bound 2‖c‖ ≤ ¾‖v‖ is here that of the step size expected.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

REACH = 0.25
"""w is a difference of residuals this part of the expected step apart."""
LARGEST = 0.75
"""Bound of 2‖t²c‖/‖t·v‖ at the expected step size."""


def acceleration(
    solve: Callable[[Tensor], Tensor],
    at: Callable[[float], Tensor],
    s: Float[Tensor, " batch"],
    image: Float[Tensor, " batch"],
    change: Float[Tensor, " size"],
    step: float,
) -> Float[Tensor, " size"] | None:
    """Returns c, or None where it is not to be trusted: too large beside v, or not finite.

    Arguments:
        solve: b [B] -> argmin ‖J c − b‖² + λ‖c‖².
        at: h -> s(θ − h·v).
        image: J v.
        change: v.
        step: t that is expected; w is measured over a part of it.

    >>> v = torch.tensor([1.0], dtype=torch.float64)
    >>> at = lambda h: (1 - h * v) + (1 - h * v) ** 2  # s = θ + θ² at θ = 1, J = 3, w = 2
    >>> acceleration(lambda b: b / 3, at, at(0.0), 3 * v, v, 0.5)
    tensor([0.3333], dtype=torch.float64)
    """
    h = REACH * step
    reached = at(h)
    if reached.shape != s.shape:
        return None
    half = (reached - s + h * image) / h**2
    if not bool(half.isfinite().all()):
        return None
    found = solve(half)
    longest = LARGEST / (2 * step) * torch.linalg.vector_norm(change)
    return found if bool(torch.linalg.vector_norm(found) <= longest) else None
