"""Blocks of several outputs for each sample, the rows of a Jacobian: what no output changes is held once.

    g_bc = ∂f_bc/∂θ = Σ_t z_bct ⊗ x_bt        x [B, T, I] of the operation's input, z [B, C, T, O] of each output

Rows are counted output by output, sample after sample: row b·C + c. `outputs` makes one block of those of C outputs;
only outer products and convolutions have an x to share (`Outputs`), all others become blocks of B·C rows as they are.

    rows            as of one layer with C·O outputs: one product for each sample
    Gram matrix     with one position (Z Zᵀ) ∘ (X Xᵀ ⊗ 1), Z [BC, O]; else from rows, of some entries at a time
    combined        Σ_c L_bcd g_bc: z is combined, and x is not looked at; a weighted sum is one weight gradient
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Tensor

from persample import memory
from persample.blocks import chunking, directions, reductions, sums
from persample.blocks.cancellation import Terms
from persample.blocks.chunking import chunks, consumed_budget
from persample.blocks.kinds.outer import norms_by_hadamard
from persample.blocks.precision import full_precision
from persample.blocks.products import LONGEST, gram_of_rows
from persample.blocks.types import Block, Conv, Dense, Outer, Outputs, Pulled, Rows, Stacked


def outputs(blocks: Sequence[Block]) -> Block:
    """One block of B·C rows from those of C outputs, of the same use of a parameter: one at least."""
    first = blocks[0]
    if all(type(block) is type(first) and block.shape == first.shape for block in blocks):
        found = _together(first, blocks)
        if found is not None:
            return found
    return _flat([reductions.read_rows(block) for block in blocks])


@singledispatch
def _together(first: Block, blocks: Sequence) -> Block | None:
    """The block of all outputs; None where there is no form but rows."""
    return None


@_together.register
def _(first: Dense, blocks: Sequence[Dense]) -> Block:
    return _flat([block.values for block in blocks])


@_together.register
def _(first: Rows, blocks: Sequence[Rows]) -> Block | None:
    if not _same([block.indices for block in blocks]):
        return None
    indices = first.indices.repeat_interleave(len(blocks), 0)
    return Rows(indices, torch.stack([block.z for block in blocks], 1).flatten(0, 1), first.rows)


@_together.register
def _(first: Pulled, blocks: Sequence[Pulled]) -> Block:
    return replace(first, inner=outputs([block.inner for block in blocks]))


@_together.register
def _(first: Stacked, blocks: Sequence[Stacked]) -> Block | None:
    places = [[place for place, _ in block.parts] for block in blocks]
    if any(each != places[0] for each in places):
        return None
    parts = zip(*([part for _, part in block.parts] for block in blocks), strict=True)
    return replace(first, parts=tuple((place, outputs(each)) for place, each in zip(places[0], parts, strict=True)))


@_together.register
def _(first: Outer, blocks: Sequence[Outer]) -> Block | None:
    if _same([block.x for block in blocks]):
        return Outputs(first.x, torch.stack([block.z for block in blocks], 1))
    if _same([block.z for block in blocks]):
        return Outputs(first.z, torch.stack([block.x for block in blocks], 1), transposed=True)
    return None


@_together.register
def _(first: Conv, blocks: Sequence[Conv]) -> Block | None:
    if not _same([block.x for block in blocks]):
        return None
    return Outputs(first.x, torch.stack([block.z for block in blocks], 1), first.spec)


def _flat(values: Sequence[Tensor]) -> Dense:
    return Dense(torch.stack(list(values), 1).flatten(0, 1))


def _same(factors: Sequence[Tensor]) -> bool:
    """Whether all are the same numbers: mostly the same memory."""
    first = factors[0]
    place = first.data_ptr(), first.shape, first.stride()
    return all((f.data_ptr(), f.shape, f.stride()) == place or torch.equal(f, first) for f in factors[1:])


# --- combinations of outputs ------------------------------------------------------------------------------


@singledispatch
def combined(block: Block, weights: Float[Tensor, "batch outputs combinations"]) -> Block:
    """Returns the block of rows Σ_c L_bcd g_bc, B·D of them, with L [B, C, D]."""
    return Dense(_combine(reductions.read_rows(block), weights).flatten(0, 1))


@combined.register
def _(block: Rows, weights: Tensor) -> Block:
    indices = block.indices[:: weights.shape[1]].repeat_interleave(weights.shape[2], 0)
    return Rows(indices, _combine(full_precision(block.z), weights).flatten(0, 1), block.rows)


@combined.register
def _(block: Pulled, weights: Tensor) -> Block:
    return replace(block, inner=combined(block.inner, weights))


@combined.register
def _(block: Stacked, weights: Tensor) -> Block:
    return replace(block, parts=tuple((place, combined(part, weights)) for place, part in block.parts))


@combined.register
def _(block: Outputs, weights: Tensor) -> Block:
    found = replace(block, z=_combine(full_precision(block.z).flatten(0, 1), weights))
    return found.one(0) if found.outputs == 1 else found


def _combine(rows: Tensor, weights: Tensor) -> Tensor:
    """Σ_c L_bcd r_bc, [B, D, *others], of rows [B·C, *others]."""
    batch, count, wanted = weights.shape
    flat = rows.reshape(batch, count, rows[:1].numel()) if len(rows) else rows.new_zeros(batch, count, 0)
    found = torch.bmm(weights.to(rows).mT, flat)
    return found.view(batch, wanted, *rows.shape[1:]) if len(rows) else rows.new_zeros(batch, wanted, *rows.shape[1:])


# --- reductions -------------------------------------------------------------------------------------------


@reductions.materialise.register
def _(block: Outputs, out: Tensor | None = None) -> Tensor:
    shape = (block.batch, *block.shape)
    rows = memory.empty(shape, full_precision(block.z)) if out is None else out
    wide = block.wide
    if wide is not None:
        reductions.materialise(wide, rows.view(len(block.x), *wide.shape))
        return rows
    each = rows.view(len(block.x), block.outputs, *block.shape)
    for c in range(block.outputs):
        each[:, c] = reductions.read_rows(block.one(c))
    return rows


@reductions.overwrites.register
def _(block: Outputs) -> bool:
    return reductions.overwrites(block.one(0))


@reductions.weighted_sum.register
def _(block: Outputs, c: Tensor) -> Tensor:
    weights = c.view(len(block.x), block.outputs, 1)
    return reductions.weighted_sum(combined(block, weights), torch.ones_like(c[: len(block.x)]))


@directions.dot.register
def _(block: Outputs, vectors: Tensor) -> Tensor:
    return torch.stack([directions.dot(each, vectors) for each in block.each], 1).flatten(0, 1)


@reductions.squared_norms.register
def _(block: Outputs, terms: Terms | None = None) -> Tensor:
    wide, first = block.wide, block.one(0)
    if wide is not None and not (isinstance(first, Outer) and norms_by_hadamard(first, first)):
        parts = [
            reductions.read_rows(wide.at(s))
            .view(s.stop - s.start, block.outputs, block.numel)
            .square()
            .sum(2)
            .flatten()
            for s in chunks(wide.batch, wide.numel * block.z.element_size(), consumed_budget(block.device))
        ]
        return torch.cat(parts) if parts else full_precision(block.z).new_zeros(0)
    found, own = [], []
    for each in block.each:
        of_output = Terms()
        found.append(reductions.squared_norms(each, of_output))
        own += [torch.stack(of_output.sums).sum(0)] if of_output.sums else []
    if terms is not None and own:
        terms.add(torch.stack(own, 1).flatten())
    return torch.stack(found, 1).flatten()


@reductions.squares_by_position.register
def _(block: Outputs) -> Tensor | None:
    found = [reductions.squares_by_position(each) for each in block.each]
    there = [each for each in found if each is not None]
    return torch.stack(there, 1).flatten() if there else None


@reductions.register_pair(reductions._GRAM, Outputs, Outputs)
def gram(a: Outputs, b: Outputs, terms: Terms) -> Tensor:
    """Returns K_(ac)(bd) = ⟨g_ac, h_bd⟩, [B·C, B'·C']."""
    alike = a.spec == b.spec and a.transposed == b.transposed and a.x.shape[1:] == b.x.shape[1:]
    if alike and a.spec is None and a.x.shape[1] == 1:
        return _of_one_position(a, b)
    if not alike or (a.spec is not None and a.wide is None):
        ours = [a]
        return sums.gram_by_rows(ours, ours if a is b else [b])
    # cut along z's features, so that the rows of all samples are there at once, and few entries of them
    left, right = (full_precision(each.z).movedim(-1 if a.spec is None else 2, 0) for each in (a, b))
    result = left.new_zeros(a.batch, b.batch)
    entries = a.numel // max(len(left), 1)
    bytes_each = (a.batch + (0 if a is b else b.batch)) * entries * left.element_size()
    budget = consumed_budget(a.device) if a.spec is None else chunking.CHUNK_BYTES
    for s in chunks(len(left), bytes_each, min(budget, max(1, LONGEST // max(entries, 1)) * bytes_each)):
        result += gram_of_rows(_rows(a, left[s]), None if a is b else _rows(b, right[s]))
    return result


def _of_one_position(a: Outputs, b: Outputs) -> Tensor:
    same = a is b
    ax, az, bx, bz = (full_precision(factor) for factor in (a.x, a.z, b.x, b.z))
    products = gram_of_rows(az.flatten(0, 1)[:, 0], None if same else bz.flatten(0, 1)[:, 0])
    inputs = gram_of_rows(ax[:, 0], None if same else bx[:, 0])
    apart = products.view(len(ax), a.outputs, len(bx), b.outputs)
    return apart.mul_(inputs[:, None, :, None]).view(a.batch, b.batch)


def _rows(block: Outputs, z: Tensor) -> Float[Tensor, "rows entries"]:
    """Rows of some of z's features, which come first."""
    if block.spec is None:
        return reductions.materialise(replace(block, z=z.movedim(0, -1))).flatten(1)
    spec = replace(block.spec, weight_shape=(len(z), *block.spec.weight_shape[1:]))
    return reductions.materialise(replace(block, z=z.movedim(0, 2), spec=spec)).flatten(1)
