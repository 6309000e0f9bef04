"""Inner products with directions: ⟨g_b, V_k⟩ of every row with every one of K vectors, in the cheaper of two orders.

    from factors    ⟨z_bt ⊗ x_bt, V⟩ = z_bt · (V x_bt), added up over t         K T I O multiplications a sample
    from rows       g_b · V_k, rows formed a few at a time and consumed          (T + K) I O

The first is for one direction or one position: with 16 directions and 32 positions the second has a tenth of its
multiplications.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from persample.blocks.chunking import chunks, consumed_budget
from persample.blocks.consumed import row_parts
from persample.blocks.precision import full_precision
from persample.blocks.products import gram_of_rows, row_products
from persample.blocks.reductions import real_rows
from persample.blocks.types import Block, Outer, Rows

BATCHED = 1.6
"""Times as fast as products of rows, sample by sample, large products run (`persample.blocks.kinds.outer`)."""


@singledispatch
def dot(block: Block, vectors: Inexact[Tensor, "directions *shape"]) -> Float[Tensor, "batch directions"]:
    """Returns ⟨g_b, V_k⟩, [B, K]."""
    result: Tensor | None = None
    for samples, entries, rows in row_parts([block]):
        if result is None:
            lines, result = _like(vectors, rows, block.numel), rows.new_zeros(block.batch, len(vectors))
        result[samples] += gram_of_rows(rows, lines[:, entries])
    return vectors.real.new_zeros(block.batch, len(vectors)) if result is None else result


def _like(vectors: Tensor, rows: Tensor, numel: int) -> Tensor:
    """Directions as rows of real numbers, as many as rows have."""
    wanted = rows.dtype.to_complex() if rows.shape[1] > numel else rows.dtype
    return real_rows(vectors.to(wanted))


@dot.register
def _(block: Outer, vectors: Tensor) -> Tensor:
    (batch, time, inp), out = block.x.shape, block.z.shape[2]
    if not from_factors(time, len(vectors)):
        return dot.dispatch(object)(block, vectors)
    x, z = full_precision(block.x), full_precision(block.z)
    result, rows = x.new_zeros(batch, len(vectors)), x.reshape(batch * time, inp)
    for k, vector in enumerate(vectors.to(x.dtype)):
        result[:, k] = torch.linalg.vecdot(row_products(rows, vector).view(batch, time, out), z).sum(1)
    return result


@dot.register
def _(block: Rows, vectors: Tensor) -> Tensor:
    z = full_precision(block.z)
    lines = vectors.to(z.dtype).transpose(0, 1)  # [rows, K, D]: what the directions have for one row of the table
    result, each = z.new_zeros(block.batch, len(vectors)), z[:1].numel() * len(vectors) * z.element_size()
    for s in chunks(block.batch, each, consumed_budget(z.device)):
        result[s] = torch.einsum("btd,btkd->bk", z[s], lines[block.indices[s]])
    return result


def from_factors(time: int, directions: int) -> bool:
    """Whether ⟨g_b, V_k⟩ costs fewer multiplications from factors than from rows: K T against w T + K."""
    return directions * time <= BATCHED * time + directions
