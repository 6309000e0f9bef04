"""Rows to be consumed: formed a few at a time, where they stay in the cache, and read once.

    row_parts           g_b of some samples, of some entries, one part after the other
    sum_of_squares      Σ_b |g_b|², entry by entry                         [*shape]
    squared_deviations  Σ_b |g_b - ḡ|² for ḡ = 1/B Σ_b g_b                 [*shape]

Rows are sums over the uses of a parameter, so cross terms are in them. Two kinds of blocks need no rows: with one
position Σ_b (z_bo x_bi)² is a product of squares, and of a table only what is touched is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import singledispatch
from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from persample.blocks.chunking import chunks, consumed_budget
from persample.blocks.convolution import gradients as convolution
from persample.blocks.kinds import tables
from persample.blocks.precision import full_precision
from persample.blocks.products import LONGEST, weight_product, weight_products
from persample.blocks.reductions import read_rows, real_rows, weighted_sum
from persample.blocks.sums import add
from persample.blocks.types import Block, Conv, Outer, Rows
from persample.memory import workspace

Part = tuple[slice, slice, Float[Tensor, "some entries"]]
"""Samples, entries of the parameter (of real numbers, two for a complex one), and their rows."""


def row_parts(uses: Sequence[Block]) -> Iterator[Part]:
    """Shows g_b in parts, each to be read before the next one is asked for, and never written to or kept.

    Args:
        uses: the blocks of one parameter, one at least.
    """
    if len(uses) == 1:
        yield from _parts(uses[0])
        return
    for samples in _samples(uses[0]):
        rows = add([real_rows(read_rows(block.at(samples))) for block in uses])
        yield samples, slice(rows.shape[1]), rows


@singledispatch
def _parts(block: Block) -> Iterator[Part]:
    for samples in _samples(block):
        rows = real_rows(read_rows(block.at(samples)))
        yield samples, slice(rows.shape[1]), rows


@_parts.register
def _(block: Outer) -> Iterator[Part]:
    """Cut along the parameter: what is read beside rows, such as directions, is then read once."""
    x, z = full_precision(block.x).detach(), full_precision(block.z).detach()
    (batch, time, inp), out, size = x.shape, z.shape[2], x.element_size()
    budget = min(consumed_budget(x.device), max(batch, 1) * LONGEST * size)
    for s in chunks(out, batch * inp * size, budget):
        part = z[:, :, s]
        memory = workspace.room((batch, part.shape[2], inp), x) if x.dtype == z.dtype else None
        rows = torch.mul(part.mT, x, out=memory) if time == 1 else weight_products(part, x, memory)
        yield slice(batch), slice(s.start * inp, s.stop * inp), rows.flatten(1)


@_parts.register
def _(block: Conv) -> Iterator[Part]:
    for s in _samples(block):
        rows = convolution.per_sample_grads(block.x[s], block.z[s], block.spec, empty=workspace.empty)
        yield s, slice(block.numel), rows.flatten(1)


def _samples(block: Block) -> Iterator[slice]:
    return chunks(block.batch, block.numel * block.dtype.itemsize, consumed_budget(block.device))


# --- sums over the batch, entry by entry ------------------------------------------------------------------


def sum_of_squares(uses: Sequence[Block]) -> Float[Tensor, " *shape"]:
    """Returns Σ_b |g_b|², entry by entry, [*shape]."""
    if _one_position(uses):
        return _squares_of_one_position(uses[0])
    if len(uses) == 1 and isinstance(uses[0], Rows):
        once = tables.once(uses[0])
        return _into_table(once, once.z.square())
    return _added_up(uses, lambda _, rows: torch.square(rows, out=_room(rows)))


def squared_deviations(uses: Sequence[Block]) -> Float[Tensor, " *shape"]:
    """Returns Σ_b |g_b - ḡ|², entry by entry, [*shape], with ḡ the mean of the rows.

    Not Σ_b |g_b|² - B |ḡ|², in which digits are lost where samples agree; but of products of float32 with one position
    in float64, where it has more of them left than deviations of rounded rows have.
    """
    if _one_position(uses) and uses[0].device.type == "cpu" and uses[0].dtype == torch.float32:
        return _deviations_of_one_position(uses[0])
    ones = torch.ones(uses[0].batch, dtype=uses[0].dtype.to_real(), device=uses[0].device)
    mean = add([weighted_sum(block, ones) for block in uses]) / uses[0].batch
    if len(uses) == 1 and isinstance(uses[0], Rows):
        return _deviations_in_table(uses[0], mean)
    center = real_rows(mean[None])[0]
    return _added_up(uses, lambda entries, rows: torch.sub(rows, center[entries], out=_room(rows)).square_())


def _squares_of_one_position(block: Outer) -> Tensor:
    """Σ_b z_b² ⊗ x_b², with x and z scaled by powers of two to one size: their squares are then numbers if g_b² is."""
    x, z = full_precision(block.x)[:, 0], full_precision(block.z)[:, 0]
    sizes = [torch.frexp(_largest(factor)).exponent for factor in (x, z)]
    shift = (sizes[1] - sizes[0]).div(2, rounding_mode="floor").clamp(-60, 60)  # 2^60 is a number in any precision
    x, z = torch.ldexp(x, shift[:, None]), torch.ldexp(z, -shift[:, None])
    return weight_product(z.square(), x.square())


def _deviations_of_one_position(block: Outer) -> Tensor:
    x, z = block.x[:, 0].double(), block.z[:, 0].double()
    total = z.mT @ x
    return torch.addcmul(z.square().mT @ x.square(), total, total, value=-1 / max(block.batch, 1)).clamp_(min=0).float()


def _largest(rows: Tensor) -> Tensor:
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_ones(len(rows))
    return torch.where((largest > 0) & largest.isfinite(), largest, 1)


def _one_position(uses: Sequence[Block]) -> TypeGuard[Sequence[Outer]]:
    return len(uses) == 1 and isinstance(uses[0], Outer) and uses[0].x.shape[1] == 1


def _deviations_in_table(block: Rows, mean: Tensor) -> Tensor:
    """Samples that do not touch a row have zeros there: they count |ḡ|² each."""
    once, time = tables.once(block), block.indices.shape[1]
    if not time:
        return mean.new_zeros(block.shape)
    ordered = block.indices.sort(1).values
    touched = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)
    there = torch.arange(time, device=block.device) < touched[:, None]  # what is left over touches nothing
    counts = _into_table(once, there[:, :, None].to(mean))
    found = (once.z - mean[once.indices]).square() * there[:, :, None]
    return _into_table(once, found) + (block.batch - counts) * mean.square()


def _into_table(block: Rows, values: Tensor) -> Tensor:
    into = values.new_zeros(block.rows, values.shape[2])
    return into.index_add_(0, block.indices.reshape(-1), values.reshape(-1, values.shape[2]))


def _room(rows: Tensor) -> Tensor | None:
    return workspace.room(rows.shape, rows, "other rows")


def _added_up(uses: Sequence[Block], of: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """Sums over the batch of what `of` makes of entries and their rows, in place, [*shape]; complex ones in one."""
    numel, total = uses[0].numel, None
    for _, entries, rows in row_parts(uses):
        if total is None:  # rows, not factors, say of what kind a parameter is that was cast on its way to its use
            total = rows.new_zeros(max(numel, rows.shape[1]))
        total[entries] += of(entries, rows).sum(0)
    if total is None:
        return torch.zeros(uses[0].shape, dtype=uses[0].dtype.to_real(), device=uses[0].device)
    return (total.view(numel, 2).sum(1) if len(total) > numel else total).view(uses[0].shape)
