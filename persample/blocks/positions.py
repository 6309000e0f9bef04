"""The shares of positions in a gradient: g_b = Σ_t s_bt, where the blocks of all uses are sums over positions.

    Outer   s_bt = z_bt ⊗ x_bt, of token, pixel or call t
    Conv    z_bt ⊗ patch_bt, of output position t (of a transposed convolution: of input position t)
    Rows    e_index(b,t) ⊗ z_bt, of look-up t

A share is what the position's use of the parameter adds to the gradient of the sample's loss, whatever other positions
did with what came out of it: not the gradient of a loss at that position. So a position is a sample of a block with one
position. Of samples with fewer positions than others the last ones are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import singledispatch
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from persample.blocks import reductions
from persample.blocks.chunking import chunks
from persample.blocks.convolution.algorithms import ordinary, patches
from persample.blocks.types import Block, Conv, Outer, Pulled, Rows, Stacked

Uses = Sequence[Block]


def norms(uses: Uses) -> Float[Tensor, "batch positions"] | None:
    """Returns ‖s_bt‖, [B, T], the positions of all uses one after the other; None where a use has none."""
    found = []
    for use in uses:
        parts = []
        for samples in chunks(use.batch, _bytes(use)):
            of_samples = apart(use.at(samples))
            if of_samples is None:
                return None
            squares = [reductions.squared_norms(each) for each in of_samples]
            count = samples.stop - samples.start
            parts.append(torch.cat([each.view(count, len(each) // count) for each in squares], 1))
        if not parts:
            return None if apart(use) is None else reductions.squared_norms(use).new_zeros(0, 0)
        found.append(torch.cat(parts))
    return torch.cat(found, 1).clamp(min=0).sqrt()


def gram(ours: Uses, theirs: Uses) -> Float[Tensor, "batch positions other others"] | None:
    """Returns ⟨s_at, s'_bt'⟩, [B, T, B', T']; None where a use has no positions."""
    sides: list[list[Block]] = []
    for uses in (ours, theirs):
        found = [apart(use) for use in uses]
        if any(each is None for each in found):
            return None
        sides.append([block for each in found if each is not None for block in each])
    sizes = ours[0].batch, theirs[0].batch
    rows = []
    for a in sides[0]:
        # of the same blocks, each with itself: a symmetric product takes half
        row = [reductions.gram(a, None if b is a else b) for b in (sides[0] if theirs is ours else sides[1])]
        shapes = (sizes[0], a.batch // max(sizes[0], 1), sizes[1])
        rows.append(torch.cat([k.view(*shapes, k.shape[1] // max(sizes[1], 1)) for k in row], 3))
    return torch.cat(rows, 1)


@singledispatch
def apart(block: Block) -> list[Block] | None:
    """Blocks of B·T rows, one for each position of each sample; None for rows that are no such sums."""
    return None


@apart.register
def _(block: Outer) -> list[Block] | None:
    return [Outer(block.x.flatten(0, 1)[:, None], block.z.flatten(0, 1)[:, None])]


@apart.register
def _(block: Rows) -> list[Block] | None:
    return [Rows(block.indices.reshape(-1, 1), block.z.flatten(0, 1)[:, None], block.rows)]


@apart.register
def _(block: Conv) -> list[Block] | None:
    x, z, spec = ordinary(block.x, block.z, block.spec)
    time, axes = tuple(z.shape[2:]), z.ndim - 2
    met = patches(x, spec, time).flatten(2 + axes).movedim(-1, 1).flatten(0, 1)  # [B·T, inp, *kernel]
    z = z.flatten(2).movedim(2, 1).reshape(-1, z.shape[1], *(1,) * axes)
    once, nothing = (1,) * axes, (0,) * axes
    return [Conv(met, z, replace(spec, stride=once, dilation=once, padding=nothing, output_padding=nothing))]


@apart.register
def _(block: Pulled) -> list[Block] | None:
    found = apart(block.inner)
    return None if found is None else [replace(block, inner=each) for each in found]


@apart.register
def _(block: Stacked) -> list[Block] | None:
    """Each slice by itself: positions that met it."""
    found: list[Block] = []
    for place, part in block.parts:
        of_slice = apart(part)
        if of_slice is None:
            return None
        found += [Stacked(((place, each),), block.dim, block.stacked_shape) for each in of_slice]
    return found


def _bytes(block: Block) -> int:
    """What `apart` or its norms take for one sample beside the factors."""
    if isinstance(block, Pulled):
        whole = 0 if block.isometric else block.numel * block.dtype.itemsize
        return _bytes(block.inner) + whole * max(1, sum(each.batch for each in apart(block.inner.at(slice(1))) or ()))
    if isinstance(block, Conv):
        entries = block.spec.groups * prod(block.spec.weight_shape[1:])
        return entries * prod((block.x if block.spec.transposed else block.z).shape[2:]) * block.dtype.itemsize
    return 1
