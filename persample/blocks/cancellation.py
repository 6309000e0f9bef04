"""What a sum of squares has lost where its terms cancel, and whose it is.

‖g_b‖² without g_b is a sum over pairs of positions, or of uses. In floating point with unit roundoff ε its error is
about ε D_b, where D_b are the terms of each position with itself, Σ_t ‖z_bt‖² ‖x_bt‖². A row, added up entry by entry,
has an error of ε √D_b: its norm is off by ε √(D_b / ‖g_b‖²), that from the sum over pairs by ε D_b / ‖g_b‖². Both are
as good while D_b is no larger than ‖g_b‖². Once positions cancel (a layer on two views of a sample, and the difference
of both), the sum is worthless, and the rows of those samples are formed.

Measured in float32, for 2 to 128 positions of 64 to 1024 features that share an offset: with D_b / ‖g_b‖² = 1, 10, 100,
10,000 norms are off by 2e-8 to 5e-8, 1e-7 to 6e-7, 6e-7 to 5e-6, 1e-4 to 6e-4 in the median; those of rows by 2e-8.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

MOST = 4.0
"""D_b / ‖g_b‖² up to which a sum over pairs is as good as a row."""
OF_ROWS = 1 / 128
"""What D_b counts where rows were formed for the norm, and are not for a weighted sum: the two then differ by
ε √(D_b / ‖g_b‖²), which must be small beside the bound of a clipped sum."""


class Terms:
    """Gets the terms D_b of every form that adds up what may cancel. Forms that form rows have none."""

    def __init__(self) -> None:
        self.sums: list[Float[Tensor, " batch"]] = []
        self.of_two = False
        """Whether inner products of two different blocks were formed so: the squares of both are to be looked at."""

    def add(self, terms: Float[Tensor, " batch"]) -> None:
        """Takes D_b of a sum over pairs."""
        self.sums.append(terms)

    def add_of_rows(self, terms: Float[Tensor, " batch"] | None) -> None:
        """Takes D_b of rows that were formed, and that a weighted sum will not form; None: they are no sums."""
        if terms is not None:
            self.sums.append(OF_ROWS * terms)

    def cancelling(self, squares: Float[Tensor, " batch"]) -> Int[Tensor, " some"] | None:
        """The samples whose squares ‖g_b‖² have lost digits; None where there is none."""
        if not self.sums:
            return None
        low = squares.detach() * MOST < sum(part.to(squares) for part in self.sums)
        return low.nonzero()[:, 0] if bool(low.any()) else None


def lengths(rows: Float[Tensor, "batch entries"]) -> Float[Tensor, " batch"]:
    """‖g_b‖ of rows whose squares may overflow or vanish, [B]; NaN where an entry is NaN or infinite."""
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    # Not vector_norm: it adds one square after the other, where sum goes by pairs.
    return (rows / scale[:, None]).square_().sum(1).sqrt() * scale
