"""The per-sample gradient of one parameter: the sum of the blocks of all its uses, cross terms included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

from torch import Tensor

from persample import reductions
from persample.backends import Captured
from persample.blocks import Block, Conv, Dense, Outer
from persample.kernels import FORMS, forced_among
from persample.precision import full_precision
from persample.reductions import real_rows


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
        return replace(self, uses=(replace(use, block=Dense(reductions.materialise(block))),))

    def squared_norms(self) -> Tensor:
        """‖g_b‖², [B]."""
        if not self.blocks:
            return self._no_numbers(self._batch)
        if len(self.blocks) == 1 or _all_fast(self.blocks):
            squares = [reductions.squared_norms(block) for block in self.blocks]
            crosses = [2 * reductions.inner(a, b) for a, b in combinations(self.blocks, 2)]
            return add([*squares, *crosses])
        return real_rows(self.materialise()).square().sum(1)

    def gram(self, right: Gradient) -> Tensor:
        """⟨g_a, h_b⟩, [B, B'], with h the rows of `right`, which may be this gradient itself."""
        ours, theirs = self.blocks, right.blocks
        if not ours or not theirs:
            return self._no_numbers(self._batch, right._batch)
        if (len(ours) == len(theirs) == 1) or _all_fast([*ours, *theirs]):
            if right is self:
                crosses = [reductions.gram(a, b) for a, b in combinations(ours, 2)]
                return add([*(reductions.gram(a) for a in ours), *(k + k.T for k in crosses)])
            return add([reductions.gram(a, b) for a in ours for b in theirs])
        rows = real_rows(self.materialise())
        return rows @ (rows if right is self else real_rows(right.materialise())).T

    def weighted_sum(self, c: Tensor) -> Tensor:
        """Σ_b c_b g_b, [*shape]."""
        parts = [reductions.weighted_sum(block, c.to(block.device)) for block in self.blocks]
        return add(parts) if parts else self.zeros()

    def dot(self, vector: Tensor) -> Tensor:
        """⟨g_b, v⟩, [B]."""
        total = self._no_numbers(self._batch)
        for block in self.blocks:
            total = total + reductions.dot(block, vector.to(block.device)).to(total)
        return total

    @property
    def _batch(self) -> int:
        return self.losses.shape[0]

    def _no_numbers(self, *shape: int) -> Tensor:
        return self.losses.new_zeros(shape, dtype=full_precision(self.losses).dtype)


def add(parts: Sequence[Tensor]) -> Tensor:
    """The sum of one tensor at least."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _all_fast(blocks: Sequence[Block]) -> bool:
    """True where every pair of blocks has a form that materialises nothing."""
    return all(reductions.has_pair_form(a, b) for a, b in combinations(blocks, 2))
