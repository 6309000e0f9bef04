"""Whose rows are whose, found without holding z: fingerprints of its rows stand in for the entries.

The bits of a floating-point number, read as an integer, grow by k·u when it is multiplied by 2^k, where u is the
unit in which the exponent counts; those of zero stay as they are. With random factors r_j, all modulo 2^64,

    H_i = Σ_j r_j bits(z_ij),    N_i = Σ_j r_j [z_ij ≠ 0]

row i of a gradient of weighted losses has H_i + k·u·N_i if every entry is that of z times 2^k, to the last bit: k tells
the sample, as in `persample.attribution.probing`. A row of which an entry differs has that with a probability of 2^-32
at most, for each probe anew. What rows of an axis do not explain (entries with owners of their own, samples that mix,
numbers so small that they lose digits) is left to a comparison with z itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from jaxtyping import Int
from torch import Tensor

from persample.attribution.owner import NOBODY, Output, Owner, fill, likely_axes
from persample.attribution.probing import DEFAULT_LEVELS, LEVELS, Visit, powers, probes

PIECE, PIECE_CUDA = 2**15, 2**20
"""Entries whose bits are multiplied at a time: on a CPU as many as its cache holds the 64-bit products of."""
ROWS = 2**13
"""Rows whose digits are looked up at a time."""
ALL = slice(None)
_BITS: dict[torch.dtype, tuple[torch.dtype, int, int]] = {
    torch.float32: (torch.int32, 1, 2**23),
    torch.float64: (torch.int32, 2, 2**20),
    torch.bfloat16: (torch.int16, 1, 2**7),
    torch.float16: (torch.int16, 1, 2**10),
}
"""How bits are read: as which integers, how many for a number, and the exponent's unit in the most significant one."""


def candidates(shape: Sequence[int], batch: int) -> list[int]:
    """Axes that may count samples, in the order in which they are believed: those that samples divide evenly."""
    return [axis for axis in likely_axes(shape, batch) if shape[axis] and shape[axis] % batch == 0]


def recognise(
    watch: Callable[[Tensor, Visit], None], losses: Tensor, count: int, part: slice = ALL
) -> tuple[list[Output | None], list[Owner | None]]:
    """Returns what is known of z, and its owner, at each of several places; no owner where none was recognised.

    Args:
        watch: `watch(v, visit)` shows the gradients of Σ_b v_b ℓ_b one by one, and keeps none. It is called
            1 + ⌈log_`LEVELS` B⌉ times.
        losses: [B].
        count: number of places.
        part: of the `candidates`, those that are tried.
    """
    batch = losses.shape[0]
    found: list[Fingerprints | None] = [None] * count

    def first(place: int, z: Tensor) -> None:
        found[place] = Fingerprints(z, batch, part)

    watch(torch.ones_like(losses), first)
    present = [prints.output.dtype for prints in found if prints is not None] + [losses.dtype]
    lowest = min(present, key=lambda dtype: torch.finfo(dtype).max)
    levels = LEVELS.get(lowest, DEFAULT_LEVELS)
    for weights in probes(batch, lowest.to_real(), losses.device) if batch > 1 else ():

        def compare(place: int, probe: Tensor) -> None:
            prints = found[place]
            if prints is not None:
                prints.compare(probe, levels)

        watch(weights.to(losses.dtype), compare)
    return (
        [None if prints is None else prints.output for prints in found],
        [None if prints is None else prints.owner() for prints in found],
    )


class Fingerprints:
    """Of the rows of one z along each axis that may count samples, and what the probes have shown of these."""

    def __init__(self, z: Tensor, batch: int, part: slice = ALL) -> None:
        self.output, self._batch = Output.of(z), batch
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._ids: dict[int, Tensor] = {}
        self._place = 1
        if batch > 1 and z.layout == torch.strided and z.dtype.to_real() in _BITS:
            for axis in candidates(z.shape, batch)[part]:
                self._rows[axis] = fingerprint(z, axis), weight(z, axis)
                self._ids[axis] = torch.zeros(z.shape[axis], dtype=torch.long, device=z.device)

    def compare(self, probe: Tensor, levels: int) -> None:
        """Takes the next probe, weights by digit as `powers` has them; an axis that does not explain it is out."""
        unit = _BITS[probe.dtype.to_real()][2] if self._rows else 0
        for axis, (rows, weights) in list(self._rows.items()):
            exponents = powers(levels, probe.device)
            digit = torch.full_like(rows, NOBODY)
            there = fingerprint(probe, axis)
            for start in range(0, len(rows), ROWS):
                part = slice(start, start + ROWS)
                same = there[part] == rows[part] + unit * exponents[:, None] * weights[part]  # [levels, rows]
                digit[part] = torch.where(same.any(0), same.byte().argmax(0), NOBODY)
            if bool((digit != NOBODY).all()):
                self._ids[axis] += digit * self._place
            else:
                del self._rows[axis], self._ids[axis]
        self._place *= levels

    def owner(self) -> Owner | None:
        """Whom the rows belong to; None where no axis explains the probes."""
        shape, device = self.output.shape, self.output.device
        if self._batch <= 1:
            ids = torch.zeros(shape[:1], dtype=torch.long, device=device)
            return Owner(0 if shape else None, ids, self._batch)
        for axis, (_, weights) in self._rows.items():
            ids = self._ids[axis].masked_fill(weights == 0, NOBODY)  # rows of zeros
            if bool((ids < self._batch).all()):
                return Owner(axis, fill(ids, self._batch), self._batch)
        return None


def fingerprint(z: Tensor, axis: int) -> Int[Tensor, " size"]:
    """H_i of the rows of z along an axis, modulo 2^64; equal for equal rows, in any memory order."""
    integers, words, _ = _BITS[z.dtype.to_real()]
    total = torch.zeros(z.shape[axis], dtype=torch.long, device=z.device)
    for rows, start, piece in _pieces(z, axis):
        bits = piece.view(integers)
        total[rows] += (bits * _factors(start, piece.shape[1], words, z.device)).sum(1)
    return total


def weight(z: Tensor, axis: int) -> Int[Tensor, " size"]:
    """N_i of the rows of z along an axis, modulo 2^64."""
    _, words, _ = _BITS[z.dtype.to_real()]
    highest = words - 1 if sys.byteorder == "little" else 0
    total = torch.zeros(z.shape[axis], dtype=torch.long, device=z.device)
    for rows, start, piece in _pieces(z, axis):
        factors = _factors(start, piece.shape[1], words, z.device)[highest::words]
        total[rows] += ((piece != 0).long() * factors).sum(1)
    return total


def _pieces(z: Tensor, axis: int) -> Iterator[tuple[slice, int, Tensor]]:
    """z as [rows, entries], a piece at a time: which rows, the first entry, and the numbers, real, in a row."""
    z = torch.view_as_real(z.resolve_conj()) if z.is_complex() else z
    z = z.movedim(axis, 0)
    entries, piece = z[:1].numel(), _piece(z.device)
    step = max(1, piece // max(1, entries))
    for row in range(0, z.shape[0] if entries else 0, step):
        rows = z[row : row + step].reshape(-1, entries)
        for start in range(0, entries, piece):
            part = rows[:, start : start + piece]
            part = part if part.stride(-1) == 1 else part.clone(memory_format=torch.contiguous_format)
            yield slice(row, row + step), start, part


def _piece(device: torch.device) -> int:
    return PIECE if device.type == "cpu" else PIECE_CUDA


def _factors(start: int, count: int, words: int, device: torch.device) -> Int[Tensor, " count"]:
    """r_j of the `count` integers that entries from number `start` on consist of: random, and the same each time."""
    piece = _piece(device)
    table, scales = _table(device, piece)
    factors = table[: count * words]
    return factors * scales[start // piece % len(scales)] if start else factors


@cache
def _table(device: torch.device, piece: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    table, scales = (
        torch.randint(-(2**63), 2**63 - 1, (size,), generator=generator).to(device) for size in (2 * piece, 4096)
    )
    return table, scales | 1  # odd: one to one modulo 2^64
