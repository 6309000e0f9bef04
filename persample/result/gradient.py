"""The per-sample gradient of one parameter: the sum of the blocks of all its uses, cross terms included."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from persample import memory
from persample.blocks import consumed, directions, positions, reductions, sums
from persample.blocks.kernels import FORMS, forced_among
from persample.blocks.precision import full_precision
from persample.blocks.reductions import overwrites
from persample.blocks.types import Block, Conv, Dense, Outer
from persample.capture.types import Captured
from persample.projections.maps import Map
from persample.projections.of_blocks import features


@dataclass(frozen=True)
class Gradient:
    """Rows g_b of one parameter; every method forms what it returns. Without uses all of them are zero."""

    parameter: Tensor
    uses: tuple[Captured, ...]
    losses: Tensor
    """[B]; zeros have their precision and device."""

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """One block for each use."""
        return tuple(use.block for use in self.uses)

    def zeros(self, *leading: int) -> Tensor:
        """Zeros [*leading, *shape] in the precision of the results."""
        return full_precision(self.parameter.new_zeros((*leading, *self.parameter.shape)))

    def materialise(self, out: Tensor | None = None) -> Tensor:
        """g_b, [B, *shape]."""
        if not self.blocks:
            return self.zeros(self._batch) if out is None else out.zero_()
        total = reductions.materialise(self.blocks[0], out)
        for block in self.blocks[1:]:
            rows = reductions.materialise(block)
            total = total + rows if out is None else total.add_(rows)
        return total

    def condensed(self) -> Gradient:
        """The same, with rows in place of larger factors: norms and Gram matrix form the rows anyway."""
        if len(self.uses) != 1 or forced_among(FORMS) == "hadamard":
            return self
        (use,) = self.uses
        block = use.block
        if not isinstance(block, Conv | Outer) or block.batch * block.numel * block.dtype.itemsize > block.nbytes:
            return self
        if isinstance(block, Outer) and block.x.shape[1] == 1:
            return self  # ‖x_b‖ ‖z_b‖ needs no rows
        return replace(self, uses=(replace(use, block=Dense(reductions.materialise(block))),))

    def squared_norms(self) -> tuple[Tensor, Tensor | None]:
        """‖g_b‖², [B], and the samples of which rows were formed for it; see `persample.blocks.sums`."""
        return sums.squared_norms(self.blocks) if self.blocks else (self._no_numbers(self._batch), None)

    def lengths_of(self, samples: Tensor) -> Tensor:
        """‖g_b‖ of some samples, from their rows, [n]."""
        return sums.lengths_of(self.blocks, samples) if self.blocks else self._no_numbers(len(samples))

    def gram(self, right: Gradient) -> Tensor:
        """⟨g_a, h_b⟩, [B, B'], with h the rows of `right`, which may be this gradient itself."""
        if not self.blocks or not right.blocks:
            return self._no_numbers(self._batch, right._batch)
        return sums.gram(self.blocks, right.blocks)

    def gram_around(self, right: Gradient, centers: Tensor) -> Tensor:
        """⟨g_a - ḡ, h_b - ḡ⟩, [B, B'], from rows; see `persample.blocks.sums.gram_by_rows`."""
        if not self.blocks or not right.blocks:
            return self._no_numbers(self._batch, right._batch)
        return sums.gram_by_rows(self.blocks, right.blocks, centers)

    def norms_of_positions(self) -> Tensor | None:
        """‖s_bt‖, [B, T]; None without positions."""
        return positions.norms(self.blocks) if self.blocks else None

    def gram_of_positions(self, right: Gradient) -> Tensor | None:
        """⟨s_at, s_bt'⟩, [B, T, B', T']; None without positions."""
        return positions.gram(self.blocks, right.blocks) if self.blocks and right.blocks else None

    def weighted_sum(self, c: Tensor, apart: Tensor | None = None) -> Tensor:
        """Σ_b c_b g_b, [*shape]; `apart`: samples whose rows are formed for it."""
        return sums.weighted_sum(self.blocks, c, apart) if self.blocks else self.zeros()

    def dot(self, vectors: Tensor) -> Tensor:
        """⟨g_b, V_k⟩ with vectors [K, *shape], [B, K]."""
        total = self._no_numbers(self._batch, len(vectors))
        for block in self.blocks:
            total = total + directions.dot(block, vectors.to(block.device)).to(total)
        return total

    def project(self, projection: Map) -> Tensor:
        """P g_b, [B, k]."""
        return features(self.blocks, projection) if self.blocks else self._no_numbers(self._batch, projection.k)

    def sum_of_squares(self) -> Tensor:
        """Σ_b |g_b|², entry by entry, [*shape]."""
        return consumed.sum_of_squares(self.blocks) if self.blocks else self.zeros().abs()

    def variance(self) -> Tensor:
        """1/B Σ_b |g_b - ḡ|², entry by entry, [*shape]; NaN without samples."""
        deviations = consumed.squared_deviations(self.blocks) if self.blocks else self.zeros().abs()
        return deviations / self._batch

    @property
    def _batch(self) -> int:
        return self.losses.shape[0]

    def _no_numbers(self, *shape: int) -> Tensor:
        return self.losses.new_zeros(shape, dtype=full_precision(self.losses).dtype)


def reused(gradient: Gradient) -> Tensor | None:
    """Memory of earlier rows of a parameter, where there is some and its rows are as cheaply written there."""
    batch, numel = gradient.losses.shape[0], gradient.parameter.numel()
    if not gradient.blocks or batch * numel * gradient.blocks[0].dtype.itemsize < memory.SMALLEST:
        return None
    first, *more = gradient.blocks
    if not overwrites(first) or any(block.dtype != first.dtype for block in more):
        return None
    return memory.rows(gradient.parameter, batch, first.dtype)
