"""Inner products of outer-product blocks g_b = Σ_t z_bt ⊗ x_bt in two exact forms, and which of them is cheaper.

    hadamard       ⟨g_a, h_b⟩ = Σ_(t,s) (z_at·z_bs)(x_at·x_bs)           (FNGD paper, equations 10–12, with T positions)
    materialise    ⟨g_a, h_b⟩ from the rows g and h themselves, formed a few at a time and consumed in the cache

A Gram matrix of a block with itself is symmetric, so both forms compute little more than half of it.

The Hadamard form adds up numbers of the size of its terms, of which those with t = s are Σ_t ‖z_bt‖² ‖x_bt‖² for sample
b: where positions cancel, its digits are lost (`persample.blocks.cancellation`), and to know that one must look at the
    result.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from persample.blocks import chunking
from persample.blocks.cancellation import Terms
from persample.blocks.chunking import chunks, consumed_budget
from persample.blocks.kernels import FORMS, forced_among
from persample.blocks.precision import full_precision
from persample.blocks.products import LONGEST, NARROWEST, gram_of_rows, row_products, weight_products, widest
from persample.blocks.types import Outer
from persample.memory.workspace import room

BLOCKS = 8
"""The Hadamard form of a symmetric Gram matrix works on so many rows of blocks, and leaves out what is mirrored."""


def norms_by_hadamard(a: Outer, b: Outer) -> bool:
    """Whether ⟨g_b, h_b⟩ costs fewer multiplications in the Hadamard form: T T'(I + O) against (T + T') I O.

    Never where looking at the result halts the host, but for one position, which loses nothing.
    """
    forced = forced_among(FORMS)
    if forced is not None:
        return forced == "hadamard"
    (_, time, inp), time_b, out = a.x.shape, b.x.shape[1], a.z.shape[2]
    if time * time_b > 1 and not a.z.is_cpu:
        return False
    return time * time_b * (inp + out) <= (time if a is b else time + time_b) * inp * out


def gram_by_hadamard(a: Outer, b: Outer) -> bool:
    """Whether K costs less in the Hadamard form: P (I + O + e) against (m (B T + B'T') + w (B + B') + B B') I O.

    P is the number of pairs of positions, BT·B'T', or half of that where K is symmetric. The other numbers are 0, 1
    and 0 multiplications, but for float32 on a CPU: there products of large matrices run 1.6 times as fast as
    batched ones (m), a product of two positions is multiplied and added up at the speed of memory (e = 150), and rows
    are written and read (w = 25). Measured on an AMD EPYC on one and two cores for thirteen shapes, from T 8 to 128
    and widths from 64 to 1024: the cheaper form was chosen in each; the difference was up to seven times.
    """
    forced = forced_among(FORMS)
    if forced is not None:
        return forced == "hadamard"
    (batch, time, inp), (other, time_b), out = a.x.shape, b.x.shape[:2], a.z.shape[2]
    if time * time_b > 1 and not a.z.is_cpu:
        return False
    e, m, w = (150, 1.6, 25) if widest(a.z) else (0, 1, 0)
    same = a is b
    pairs = batch * time * other * time_b / (2 if same else 1)
    positions, rows = batch * time, batch
    if not same:
        positions, rows = positions + other * time_b, rows + other
    return pairs * (inp + out + e) <= (m * positions + w * rows + batch * other) * inp * out


def inner(a: Outer, b: Outer, terms: Terms | None = None) -> Float[Tensor, " batch"]:
    """Returns ⟨g_b, h_b⟩, [B]; of a block with itself, `terms` gets what the result is a sum of."""
    (batch, time, inp), out = a.x.shape, a.z.shape[2]
    ax, az, bx, bz = (full_precision(factor) for factor in (a.x, a.z, b.x, b.z))
    if time == b.x.shape[1] == 1:
        return (ax * bx).sum((1, 2)) * (az * bz).sum((1, 2))
    size = ax.element_size()
    if norms_by_hadamard(a, b):
        parts, own = [], []
        for s in chunks(batch, 2 * time * b.x.shape[1] * size):
            products = torch.bmm(az[s], bz[s].transpose(1, 2)) * torch.bmm(ax[s], bx[s].transpose(1, 2))
            parts.append(products.sum((1, 2)))
            own.append(products.diagonal(dim1=1, dim2=2).sum(1))  # of positions, each with itself
        if a is b and own and terms is not None:
            terms.add(torch.cat(own))
    else:
        parts = []
        for s in chunks(batch, inp * out * size, consumed_budget(ax.device)):
            rows = _rows(az[s], ax[s])
            other = rows if a is b else _rows(bz[s], bx[s], "other rows")
            parts.append(torch.linalg.vecdot(rows, other))
    return torch.cat(parts) if parts else ax.new_zeros(0)


def gram(a: Outer, b: Outer, terms: Terms | None = None) -> Float[Tensor, "batch other"]:
    """Returns K_ij = ⟨g_i, h_j⟩, [B, B']; `terms` as for `inner`."""
    return _by_hadamard(a, b, terms or Terms()) if gram_by_hadamard(a, b) else _by_rows(a, b)


def _by_hadamard(a: Outer, b: Outer, terms: Terms) -> Tensor:
    (batch, time, _), (other, time_b) = a.x.shape, b.x.shape[:2]
    ax, az, bx, bz = (full_precision(factor).flatten(0, 1) for factor in (a.x, a.z, b.x, b.z))
    same = a is b
    if time == time_b == 1:
        return gram_of_rows(az, None if same else bz) * gram_of_rows(ax, None if same else bx)
    result, own = ax.new_zeros(batch, other), ax.new_empty(batch * time)
    bytes_each = 2 * time * other * time_b * ax.element_size()
    for s in chunks(batch, bytes_each, _budget(batch, time, bytes_each) if same else None):
        end = s.stop if same else other  # beyond it: mirrored
        rows, columns = slice(s.start * time, s.stop * time), slice(end * time_b)
        products = row_products(az[rows], bz[columns]).mul_(row_products(ax[rows], bx[columns]))
        block = products.view(s.stop - s.start, time, end, time_b).sum(3).sum(1)  # four times as fast as both at once
        result[s, :end] = block
        if same:
            result[: s.start, s] = block[:, : s.start].T
            own[rows] = products.diagonal(s.start * time)  # of positions, each with itself
    if same:
        terms.add(own.view(batch, time).sum(1))
    else:
        terms.of_two = True
    return result


def _budget(batch: int, time: int, bytes_each: int) -> int:
    """Bytes of `BLOCKS` rows of blocks, but of no narrower products than pay, and no more than may be taken."""
    return min(chunking.CHUNK_BYTES, max(-(-NARROWEST // max(1, time)), -(-batch // BLOCKS)) * bytes_each)


def _by_rows(a: Outer, b: Outer) -> Tensor:
    ax, az, bx, bz = (full_precision(factor) for factor in (a.x, a.z, b.x, b.z))
    if az.shape[2] < ax.shape[2]:  # transposed rows have the same inner products: cut along the longer side
        (ax, az), (bx, bz) = (az, ax), (bz, bx)
    most, size = max(ax.shape[0], bx.shape[0]), ax.element_size()
    result = ax.new_zeros(ax.shape[0], bx.shape[0])
    budget = min(consumed_budget(ax.device), most * LONGEST * size)
    for s in chunks(az.shape[2], most * ax.shape[2] * size, budget):
        rows = _rows(az[:, :, s], ax)
        rows_b = None if a is b else _rows(bz[:, :, s], bx, "other rows")
        result += gram_of_rows(rows, rows_b)
    return result


def _rows(z: Tensor, x: Tensor, use: str = "rows") -> Float[Tensor, "batch entries"]:
    """g_b as rows, in memory that is kept: to be read before the next call for this use, and never returned."""
    out = None if z.requires_grad or x.requires_grad else room((z.shape[0], z.shape[2], x.shape[2]), x, use)
    return weight_products(z, x, out).flatten(1)
