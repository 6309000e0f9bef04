"""Whether steps still lower the loss as their linear model foretells; a sentence, once, where they do not."""

from __future__ import annotations

import warnings

LITTLE = 1e-3
"""A decrease of the loss below this part of it is none,"""
PREDICTED = 0.1
"""where the linear model foretells one of this part or more."""
PATIENCE = 20
"""Such steps in a row until it is said; a step that was rejected counts as REJECTED of them."""
REJECTED = 5


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
