"""Calls of a layer on parts of the batch, joined to calls on all of it.

    layer(x[:2]), layer(x[2:])         samples 0 1 | 2 3      rows in sequence are one call of four samples
    layer(x[0]), layer(x[1]), …        0 | 1 | …              the same, of sequences that may differ in length
    layer(x), layer(x[:2])             0 1 2 3 | 0 1          two calls; samples that are missing get rows of zeros
    layer(tokens[index])               3 0 0 2 3              rows of each sample put together, filled up with zeros

g_b sums over all of a sample's positions, and one at which x and z are zero adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from persample.attribution.owner import Owner
from persample.reweighting.batch_axis.folded import Reading, unfolded

Use = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Segment:
    """What one call of a layer holds, whose output has that shape: samples first … first + count − 1 of the batch."""

    shape: tuple[int, ...]
    reading: Reading
    first: int
    count: int


@dataclass(frozen=True, eq=False)
class Listed:
    """What one call of a layer holds in this batch: row i along an axis of its output is of sample ids[i]."""

    axis: int
    ids: Tensor

    def split(self, rows: Tensor, batch: int) -> Tensor:
        """Rows of the layer's input or output by sample, [batch, rows, …], filled up with zeros."""
        return Owner(self.axis, self.ids, batch).by_sample(rows, self.axis)


Held = Segment | Listed


def assembled(uses: Sequence[Use], segments: Sequence[Held], batch: int, space: int | None) -> list[Use]:
    """Returns (x, z) of calls that hold the whole batch, with samples on axis 0.

    Arguments:
        uses: (x, z) of each call, as the layer received and returned them.
        segments: of each call.
        batch: number of samples B.
        space: how many axes of space a convolution has; None for a linear layer.
    """
    parts: list[tuple[int, Tensor, Tensor]] = []
    for (x, z), segment in zip(uses, segments, strict=True):
        if isinstance(segment, Listed):
            x, z = segment.split(x, batch), segment.split(z, batch)
            each = zip(x.unbind(1), z.unbind(1), strict=True) if space == 3 else [(x, z)]
            parts += [(0, *pair) for pair in each]
            continue
        alone = z.dim() < (2 if space is None else space + 2)  # a single sample, without an axis for it
        use = (x.unsqueeze(0), z.unsqueeze(0)) if alone else (x, z)
        parts += [(segment.first, *each) for each in unfolded([use], [segment.reading], space)]
    parts.sort(key=lambda part: part[0])
    calls: list[list[tuple[int, Tensor, Tensor]]] = []
    for part in parts if space is not None else _equally_long(parts):
        call = next((each for each in calls if _follows(each[-1], part)), None)
        if call is None:
            calls.append([part])
        else:
            call.append(part)
    return [
        (_filled([(first, x) for first, x, _ in call], batch), _filled([(first, z) for first, _, z in call], batch))
        for call in calls
    ]


def _follows(last: tuple[int, Tensor, Tensor], part: tuple[int, Tensor, Tensor]) -> bool:
    first, x, z = last
    return first + len(z) <= part[0] and x.shape[1:] == part[1].shape[1:] and z.shape[1:] == part[2].shape[1:]


def _equally_long(parts: list[tuple[int, Tensor, Tensor]]) -> list[tuple[int, Tensor, Tensor]]:
    """The parts of a linear layer with as many positions each, which have zeros behind their own."""
    if len({z.shape[1:] for _, _, z in parts}) == 1:
        return parts
    flat = [(first, _positions(x), _positions(z)) for first, x, z in parts]
    most = max(z.shape[1] for _, _, z in flat)
    fill = [(0, 0, 0, most - z.shape[1]) for _, _, z in flat]
    return [(first, F.pad(x, more), F.pad(z, more)) for (first, x, z), more in zip(flat, fill, strict=True)]


def _positions(rows: Tensor) -> Tensor:
    """[count, …, features] with one axis for all positions."""
    return rows.flatten(1, -2) if rows.dim() > 2 else rows.unsqueeze(1)


def _filled(parts: Sequence[tuple[int, Tensor]], batch: int) -> Tensor:
    """The rows of all samples, of parts that hold some of them in sequence: zeros for those that are missing."""
    pieces: list[Tensor] = []
    there = 0
    for first, rows in [*parts, (batch, parts[0][1][:0])]:
        if first > there:
            pieces.append(rows.new_zeros(first - there, *rows.shape[1:]))
        pieces.append(rows)
        there = first + len(rows)
    return pieces[0] if len(pieces[0]) == batch else torch.cat(pieces)
