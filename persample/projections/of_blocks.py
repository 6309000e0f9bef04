"""Features of per-sample gradients, from whatever holds them: without rows where the map allows it.

P_o ⊗ P_i    (P_o z_bt) ⊗ (P_i x_bt), added up over t: two thin products and one of thin matrices (LoGra: Choe et
             al., *What is Your Data Worth to GPT?*, 2024); of convolutions P_i is a convolution
by entries   rows that are formed a few at a time; of tables only what is touched
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from persample.blocks.chunking import chunks
from persample.blocks.consumed import row_parts
from persample.blocks.convolution.algorithms import ordinary
from persample.blocks.precision import full_precision
from persample.blocks.sums import add
from persample.blocks.types import Block, Conv, Outer, Outputs, Rows
from persample.projections.maps import ByEntries, Factors, Map


def features(uses: Sequence[Block], projection: Map) -> Float[Tensor, "batch k"]:
    """Returns P g_b, [B, k], for a parameter with these uses, one at least."""
    if isinstance(projection, Factors):
        return add([by_factors(block, projection) for block in uses])
    return add([by_entries(block, projection) for block in uses])


@singledispatch
def by_entries(block: Block, projection: ByEntries) -> Tensor:
    """Returns what a map that is known entry by entry makes of the rows, [B, k]."""
    found: Tensor | None = None
    for samples, entries, rows in row_parts([block]):
        found = rows.new_zeros(block.batch, projection.k) if found is None else found
        found[samples] += projection.rows(rows, entries.start or 0)
    return _none(block, projection) if found is None else found


@by_entries.register
def _(block: Outer, projection: ByEntries) -> Tensor:
    found = projection.outer(block)
    return by_entries.dispatch(object)(block, projection) if found is None else found


@by_entries.register
def _(block: Rows, projection: ByEntries) -> Tensor:
    z, width = full_precision(block.z), block.shape[1]
    entries = block.indices.long()[:, :, None] * width + torch.arange(width, device=z.device)
    return projection.picked(entries.flatten(1), z.flatten(1))


@by_entries.register
def _(block: Outputs, projection: ByEntries) -> Tensor:
    return torch.stack([by_entries(each, projection) for each in block.each], 1).flatten(0, 1)


@singledispatch
def by_factors(block: Block, projection: Factors) -> Tensor:
    """Returns P_o g_b P_iᵀ as a row, [B, k]."""
    found: Tensor | None = None
    for samples, _, rows in row_parts([block]):
        matrices = rows.view(len(rows), projection.shape[0], prod(projection.shape[1:]))  # each row comes whole
        found = rows.new_zeros(block.batch, projection.k) if found is None else found
        left = projection.left(torch.arange(matrices.shape[1], device=rows.device), rows.dtype)
        found[samples] += (left.mT @ (matrices @ projection.right(rows))).flatten(1)
    return _none(block, projection) if found is None else found


@by_factors.register
def _(block: Outer, projection: Factors) -> Tensor:
    x, z = full_precision(block.x), full_precision(block.z)
    left = z @ projection.left(torch.arange(z.shape[2], device=z.device), z.dtype)
    return torch.bmm(left.mT, x @ projection.right(x)).flatten(1)


@by_factors.register
def _(block: Rows, projection: Factors) -> Tensor:
    z = full_precision(block.z)
    right, found = projection.right(z), z.new_zeros(block.batch, projection.k)
    for s in chunks(block.batch, 2 * 8 * block.indices[:1].numel() * projection.out):
        found[s] = torch.bmm(projection.left(block.indices[s], z.dtype).mT, z[s] @ right).flatten(1)
    return found


@by_factors.register
def _(block: Conv, projection: Factors) -> Tensor:
    if block.spec.weight_shape[0] <= projection.inp * block.spec.groups:
        return by_factors.dispatch(object)(block, projection)  # P_i has as many rows as there are channels, or more
    x, z, spec = ordinary(block.x, block.z, block.spec)
    groups, time = spec.groups, z.shape[2:]
    kernel = projection.right(x).mT.reshape(projection.inp, *spec.weight_shape[1:]).repeat(groups, *(1,) * (x.ndim - 1))
    nothing = [0] * len(time)
    found = z.new_zeros(block.batch, projection.k)
    if not block.batch:
        return found
    right = torch.convolution(x, kernel, None, spec.stride, spec.padding, spec.dilation, False, nothing, groups)
    left = projection.left(torch.arange(z.shape[1], device=z.device), z.dtype).view(groups, -1, projection.out)
    z, right = z.reshape(len(z), groups, -1, time.numel()), right.reshape(len(z), groups, projection.inp, -1)
    return torch.einsum("bgct,gco,bgit->boi", z, left, right).flatten(1) if groups > 1 else _one_group(z, left, right)


@by_factors.register
def _(block: Outputs, projection: Factors) -> Tensor:
    return torch.stack([by_factors(each, projection) for each in block.each], 1).flatten(0, 1)


def _one_group(z: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.bmm(left[0].mT @ z[:, 0], right[:, 0].mT).flatten(1)


def _none(block: Block, projection: Map) -> Tensor:
    return torch.zeros(block.batch, projection.k, dtype=block.dtype.to_real(), device=block.device)
