"""Norms, Gram matrices and weighted sums of rows that are sums of blocks, one for each use of a parameter.

    ‖g_b‖²      Σ_u ‖g_b^u‖² + 2 Σ_(u<w) ⟨g_b^u, g_b^w⟩
    ⟨g_a, h_b⟩  Σ_(u,w) ⟨g_a^u, h_b^w⟩

Where every pair of uses has a form without rows, nothing is formed, but for samples in which positions or uses cancel
(`persample.blocks.cancellation`): of these the rows are. On an accelerator nothing is looked at, since that would halt
the host, and rows are formed wherever a form without them could lose something.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import isfinite

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persample.blocks import chunking, reductions
from persample.blocks.cancellation import Terms, lengths
from persample.blocks.chunking import chunks
from persample.blocks.products import gram_of_rows
from persample.blocks.reductions import read_rows, real_rows
from persample.blocks.types import Block

Uses = Sequence[Block]
"""The blocks of one parameter, one at least."""
Samples = Int[Tensor, " some"]

ROWS_KEPT = 4
"""Bytes of rows that a Gram matrix is formed from at a time, in units of `CHUNK_BYTES`: fewer are formed more often."""


def squared_norms(uses: Uses) -> tuple[Float[Tensor, " batch"], Samples | None]:
    """Returns ‖g_b‖², [B], as good as from rows, and the samples of which rows were formed for that; None for none."""
    terms = Terms()
    squares = _squares(uses, terms)
    low = terms.cancelling(squares) if squares.is_cpu else None
    if low is not None:
        squares = squares.index_copy(0, low, lengths_of(uses, low).square())
    return squares, low


def norms(parts: Sequence[Uses]) -> Float[Tensor, " batch"]:
    """Returns √(Σ_p ‖g_b^p‖²) over several parameters, each with its uses, [B]."""
    total = add([squared_norms(uses)[0] for uses in parts]).clamp(min=0).sqrt()
    beyond = overflowed(total)
    if beyond is None:
        return total
    return total.index_copy(0, beyond, lengths(torch.stack([lengths_of(uses, beyond) for uses in parts], 1)))


def overflowed(found: Float[Tensor, " batch"]) -> Samples | None:
    """The samples whose norm is no number, perhaps because its square is none; None for none. Looks on a CPU only."""
    if not found.is_cpu or isfinite(found.sum()):
        return None
    beyond = (~found.isfinite()).nonzero()[:, 0]
    return beyond if len(beyond) else None


def lengths_of(uses: Uses, samples: Samples) -> Float[Tensor, " some"]:
    """Returns ‖g_b‖ of some samples from their rows, [n]."""
    return torch.cat([lengths(real_rows(rows)) for _, rows in _rows_of(uses, samples)])


def gram(ours: Uses, theirs: Uses) -> Float[Tensor, "batch other"]:
    """Returns K_ab = ⟨g_a, h_b⟩, [B, B'], as good as from rows; `theirs` may be `ours`."""
    terms, same = Terms(), theirs is ours
    if len(ours) > 1 or len(theirs) > 1:
        if not _fast([*ours, *theirs]):
            return gram_by_rows(ours, theirs)
        terms.of_two = not same
    if not same:
        matrix = add([reductions.gram(a, b, terms) for a in ours for b in theirs])
        lost = terms.of_two and matrix.is_cpu and (_cancels(ours) or _cancels(theirs))
        return gram_by_rows(ours, theirs) if lost else matrix
    own = [reductions.gram(a, terms=terms) for a in ours]
    crosses = [reductions.gram(a, b) for a, b in combinations(ours, 2)]
    if crosses:
        terms.add(add(own).diagonal())
    matrix = add([*own, *(k + k.T for k in crosses)])
    lost = matrix.is_cpu and terms.cancelling(matrix.diagonal()) is not None
    return gram_by_rows(ours, ours) if lost else matrix


def weighted_sum(uses: Uses, c: Float[Tensor, " batch"], apart: Samples | None = None) -> Tensor:
    """Returns Σ_b c_b g_b, [*shape].

    Args:
        uses: of the parameter.
        c: [B].
        apart: samples whose rows are formed, the same as for their norms to the last bit: where positions cancel,
            another order of summation gives another row, and so a longer one than its norm says.
    """
    if apart is None:
        return add([reductions.weighted_sum(block, c.to(block.device)) for block in uses])
    total = weighted_sum(uses, c.index_fill(0, apart, 0))
    for part, rows in _rows_of(uses, apart):
        factors = c[apart[part]].to(rows)
        total = total + (factors @ rows.reshape(len(rows), -1)).view(total.shape)
    return total


def add(parts: Sequence[Tensor]) -> Tensor:
    """The sum of one tensor at least."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _squares(uses: Uses, terms: Terms) -> Tensor:
    """‖g_b‖², [B], of which digits may be lost; `terms` gets what it is a sum of."""
    if len(uses) == 1:
        squares = reductions.squared_norms(uses[0], terms)
        if not terms.sums:  # rows were formed, and a weighted sum will not form them
            terms.add_of_rows(reductions.squares_by_position(uses[0]))
        return squares
    if _fast(uses):
        own = [reductions.squared_norms(block, terms) for block in uses]
        terms.add(add(own))
        for block in uses:
            terms.add_of_rows(reductions.squares_by_position(block))
        return add([*own, *(2 * reductions.inner(a, b) for a, b in combinations(uses, 2))])
    found, sizes = [], []
    for samples in chunks(uses[0].batch, _bytes(uses)):
        each = [real_rows(read_rows(block.at(samples))) for block in uses]
        found.append(add(each).square().sum(1))
        sizes.append(add([rows.square().sum(1) for rows in each]))
    if not found:
        return reductions.squared_norms(uses[0])
    for part in (torch.cat(sizes), *map(reductions.squares_by_position, uses)):
        terms.add_of_rows(part)
    return torch.cat(found)


def _cancels(uses: Uses) -> bool:
    terms = Terms()
    return terms.cancelling(_squares(uses, terms)) is not None


def gram_by_rows(ours: Uses, theirs: Uses, centers: Tensor | None = None) -> Float[Tensor, "batch other"]:
    """Returns K from rows, those of as many samples of each side at a time as there is room for.

    Args:
        ours: uses of a parameter.
        theirs: of the same, on another batch; or `ours`.
        centers: [groups, *shape], taken off the rows before they are multiplied: off row r number r modulo groups.
    """

    def rows_of(uses: Uses, samples: slice) -> Tensor:
        rows = _rows(uses, samples)
        if centers is None:
            return real_rows(rows)
        numbers = torch.arange(samples.start, samples.stop, device=rows.device)
        return real_rows(rows - centers.to(rows.device)[numbers % len(centers)])

    same, budget = theirs is ours, ROWS_KEPT * chunking.CHUNK_BYTES
    size, other = ours[0].batch, theirs[0].batch
    result = ours[0].factors[-1].real.new_zeros(size, other, dtype=ours[0].dtype.to_real())
    for s in chunks(size, _bytes(ours), budget):
        rows = rows_of(ours, s)
        if same:
            result[s, s] = gram_of_rows(rows)
        for t in chunks(s.start if same else other, _bytes(theirs), budget):
            result[s, t] = gram_of_rows(rows, rows_of(theirs, t))
            if same:
                result[t, s] = result[s, t].T
    return result


def _rows_of(uses: Uses, samples: Samples) -> Iterator[tuple[slice, Tensor]]:
    """Shows g_b of some samples, [n, *shape], as many at a time as there is room for, always the same ones together."""
    return ((part, _rows(uses, samples[part])) for part in chunks(len(samples), _bytes(uses)))


def _rows(uses: Uses, samples: slice | Samples) -> Tensor:
    return add([read_rows(block.at(samples)) for block in uses])


def _bytes(uses: Uses) -> int:
    return uses[0].numel * uses[0].dtype.itemsize


def _fast(blocks: Sequence[Block]) -> bool:
    """True where every pair of blocks has a form that materialises nothing, and one may look at what it gives."""
    return blocks[0].factors[-1].is_cpu and all(reductions.has_pair_form(a, b) for a, b in combinations(blocks, 2))
