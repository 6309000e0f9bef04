"""Blocks of stacked parameters, one for each slice: the experts of a mixture, the layers of a stack.

    g_b [E, …] = (g_b^0, …, g_b^(E−1)) along an axis, and zero in slices that no use has a block for

Slices share no entry, so there are no cross terms: ‖g_b‖² = Σ_e ‖g_b^e‖², ⟨g_a, h_b⟩ = Σ_e ⟨g_a^e, h_b^e⟩, and a
weighted sum is that of each slice. Nothing of the size of all slices is formed for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from persample import memory
from persample.blocks import directions, reductions
from persample.blocks.cancellation import Terms
from persample.blocks.precision import full_precision
from persample.blocks.types import Block, Dense, Outer, Stacked


def stacked(blocks: Sequence[Stacked]) -> Stacked | None:
    """One block of several uses of a parameter; None where two of a slice cannot be made one."""
    if len({block.dim for block in blocks}) != 1:
        return None
    by_index: dict[int, list[Block]] = {}
    for block in blocks:
        for index, part in block.parts:
            by_index.setdefault(index, []).append(part)
    parts = {index: _one(each) for index, each in sorted(by_index.items())}
    found = tuple((index, part) for index, part in parts.items() if part is not None)
    return Stacked(found, blocks[0].dim, blocks[0].stacked_shape) if len(found) == len(parts) else None


def _one(blocks: Sequence[Block]) -> Block | None:
    if len(blocks) == 1:
        return blocks[0]
    outer = [block for block in blocks if isinstance(block, Outer)]
    dense = [block for block in blocks if isinstance(block, Dense)]
    if len(outer) == len(blocks):
        return join_outer(outer)
    return join_dense(dense) if len(dense) == len(blocks) else None


def join_outer(blocks: Sequence[Outer]) -> Outer | None:
    """Σ of outer products: the positions of all; None for fewer than two."""
    if len(blocks) < 2:
        return None
    return Outer(torch.cat([block.x for block in blocks], dim=1), torch.cat([block.z for block in blocks], dim=1))


def join_dense(blocks: Sequence[Dense]) -> Dense | None:
    """Σ of rows; None for fewer than two blocks."""
    if len(blocks) < 2:
        return None
    return Dense(torch.stack([full_precision(block.values) for block in blocks]).sum(0))


@reductions.materialise.register
def _(block: Stacked, out: Tensor | None = None) -> Tensor:
    like = full_precision(block.factors[-1])
    shape = (block.batch, *block.shape)
    rows = memory.zeros(shape, like) if out is None else out.zero_()
    for index, part in block.parts:
        rows.select(block.dim + 1, index).copy_(reductions.read_rows(part))
    return rows


@reductions.weighted_sum.register
def _(block: Stacked, c: Tensor) -> Tensor:
    total = full_precision(block.factors[-1]).new_zeros(block.shape)
    for index, part in block.parts:
        total.select(block.dim, index).copy_(reductions.weighted_sum(part, c))
    return total


@directions.dot.register
def _(block: Stacked, vectors: Tensor) -> Tensor:
    each = [directions.dot(part, vectors.select(block.dim + 1, index)) for index, part in block.parts]
    return torch.stack(each).sum(0)


@reductions.squared_norms.register
def _(block: Stacked, terms: Terms | None = None) -> Tensor:
    found, own = [], Terms()
    for _, part in block.parts:
        found.append(reductions.squared_norms(part, own))
    if terms is not None and own.sums:
        terms.add(torch.stack([each.to(found[0]) for each in own.sums]).sum(0))
    return torch.stack(found).sum(0)


@reductions.squares_by_position.register
def _(block: Stacked) -> Tensor | None:
    each = [reductions.squares_by_position(part) for _, part in block.parts]
    there = [found for found in each if found is not None]
    return torch.stack(there).sum(0) if there else None


@reductions.register_pair(reductions._GRAM, Stacked, Stacked)
def _(a: Stacked, b: Stacked, terms: Terms) -> Tensor:
    others = dict(b.parts)
    pairs = [(part, part if a is b else others[index]) for index, part in a.parts if index in others]
    if a.dim != b.dim or not pairs:
        like = full_precision(a.factors[-1])
        if a.dim != b.dim:
            return reductions.gram_of_rows(*(reductions.real_rows(reductions.read_rows(each)) for each in (a, b)))
        return like.real.new_zeros(a.batch, b.batch)
    own = Terms()
    found = [reductions.gram(part, None if part is other else other, own) for part, other in pairs]
    terms.of_two |= own.of_two
    if own.sums:
        terms.add(torch.stack([each.to(found[0]) for each in own.sums]).sum(0))
    return torch.stack(found).sum(0)
