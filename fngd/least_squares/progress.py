"""What a step did, and whether steps still lower the loss as their linear model foretells; if not, a sentence, once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

LITTLE = 1e-3
"""A decrease of the loss below this part of it is none,"""
PREDICTED = 0.1
"""where the linear model foretells one of this part or more."""
PATIENCE = 20
"""Such steps in a row until it is said; a step that was rejected counts as REJECTED of them."""
REJECTED = 5


@dataclass(frozen=True)
class StepInfo:
    """What a step did: `opt.info`."""

    loss: float
    """L before the step."""
    loss_after: float | None
    """L after it; None where nothing asked for it."""
    step_size: float
    """t; 0 where the step was rejected."""
    damping: float
    gain: float | None
    """Actual over predicted decrease; None unless damping is adaptive."""
    method: str
    error: float | None
    """Relative residual of the linear system, where the solve is approximate."""
    iterations: int
    evaluations: int
    """Closure calls after the first one."""
    retries: int
    accepted: bool
    """False: no step size of no damping tried lowered the loss, and the parameters are what they were."""


class Progress:
    """Counts the steps in a row that brought nothing."""

    def __init__(self) -> None:
        self._count, self._said = 0, False

    def note(self, loss: float, after: float, predicted: float, hidden: bool, advice: str) -> None:
        """Notes a step, and warns where it is time to.

        Arguments:
            loss, after: before and after the step.
            predicted: the decrease by a full step, as the linear model has it.
            hidden: whether rounding could hide that decrease; the end that a number format allows is no stall.
            advice: what to try.
        """
        if hidden or loss - after > LITTLE * loss or (after < loss and predicted < PREDICTED * loss):
            self._count = 0
            return
        self._count += 1 if after < loss else REJECTED
        if self._count < PATIENCE or self._said:
            return
        self._said = True
        warnings.warn(
            f"GaussNewton makes no progress: for several steps the loss has stayed at {loss:.2g}, though the linear "
            f"model foretells {100 * predicted / loss:.2g} % less by a step. {advice}",
            stacklevel=5,
        )


def advice(adaptive: bool, dtype: torch.dtype) -> str:
    """What to try where steps bring nothing, in a sentence."""
    tries = [] if adaptive else ["damping='adaptive'"]
    if dtype != torch.float64:
        tries.append("float64 (model.double())")
    tries += ["another random start", "a wider network", "inputs scaled to [−1, 1]", "other weights= of the groups"]
    return "Try " + ", ".join(tries[:-1]) + " or " + tries[-1]
