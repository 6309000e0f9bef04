"""Statistics of the joined batch of several processes, so that all of them keep the same factors.

Statistics are sums with counts; those of the joined batch are the sums over processes, whatever the batches' sizes.
They travel once a step in which they are due, after gradient accumulation, in at most three collectives for all
layers together: a table of counts and shapes, one all-reduce, one all-gather. A layer that a process has not met
counts there with no samples. Under a mean loss z is 1/N_r of an own gradient in process r, which had N_r samples, and
becomes 1/N of it, N being those of all.

What a process contributes for a layer with I inputs (bias included), O outputs, in elements for each group, when W
processes hold R rows each (R = N·T; SKFAC's reductions of convolutions: N, or N·T'):

    KFAC     I(I + 1)/2 + O(O + 1)/2         the triangles of A and G, all-reduced
    SKFAC    R·I where W·R < I, else I(I + 1)/2;   and the same for O: rows are gathered, as Tang et al. (2021) propose,
             and triangles all-reduced where there are more rows than features
    Eva      I + O                           all-reduced

and `COLUMNS` integers of 8 bytes for each layer. So SKFAC never sends more than KFAC, and R·(I + O) instead of
I² + O² where the batch is small beside the layer. (Among W processes in a ring, gathering n elements from each moves
(W − 1)·n, all-reducing n moves 2n(W − 1)/W: the two are equal for W·R = I + 1.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from fngd.kronecker.statistics import Statistics
from fngd.optim.distributed import Exchange

COLUMNS = 10
"""Integers that describe the statistics of a layer: samples, rows, kind of layer, precision and two shapes."""

DTYPES = (torch.float32, torch.float64)
Found = Mapping[str, Statistics]


@dataclass(frozen=True)
class Ranks:
    """Who takes part: `layers` in the same order in every process; `mean`: each loss is the mean of its own batch."""

    exchange: Exchange
    layers: Sequence[str]
    device: torch.device
    mean: bool


def triangle(matrix: Float[Tensor, "groups n n"]) -> Float[Tensor, "groups entries"]:
    """Returns the n(n + 1)/2 entries on and above the diagonal.

    >>> triangle(torch.tensor([[[1.0, 2.0], [2.0, 3.0]]]))
    tensor([[1., 2., 3.]])
    """
    row, column = torch.triu_indices(*matrix.shape[1:], device=matrix.device)
    return matrix[:, row, column]


def symmetric(entries: Float[Tensor, "groups entries"], size: int) -> Float[Tensor, "groups n n"]:
    """Returns the symmetric matrices of which `triangle` has left these entries.

    >>> symmetric(torch.tensor([[1.0, 2.0, 3.0]]), 2)
    tensor([[[1., 2.],
             [2., 3.]]])
    """
    row, column = torch.triu_indices(size, size, device=entries.device)
    result = entries.new_empty(entries.shape[0], size, size)
    result[:, row, column] = entries
    result[:, column, row] = entries
    return result


def joined_sums(found: Found, ranks: Ranks, *, moments: bool) -> dict[str, Statistics]:
    """Returns the statistics that the joined batch would have given, where they are sums over samples.

    Arguments:
        found: what this process has met, by layer.
        moments: whether the sums are symmetric matrices, which travel as triangles.
    """
    table = _Table(found, ranks, rows=False)
    sides = {name: [statistic.inputs, statistic.outputs] for name, statistic in table.own.items()}
    flat = [triangle(side) if moments else side for pair in sides.values() for side in pair]
    totals = iter(ranks.exchange.total(flat))
    result = {}
    for name, pair in sides.items():
        inputs, outputs = (
            symmetric(next(totals), side.shape[-1]) if moments else next(totals) for side in pair
        )  # fmt: skip
        result[name] = table.counted(name, inputs, outputs)
    return result


def joined_rows(found: Found, ranks: Ranks, merge: Callable[[Sequence[Tensor]], Tensor]) -> dict[str, Statistics]:
    """Returns the statistics that the joined batch would have given, where they are rows or, if square, moments.

    Rows are gathered while they are fewer than features over all processes; else moments are added up.
    `merge` makes one side of several.
    """
    table = _Table(found, ranks, rows=True)
    kept: dict[tuple[str, int], list[Tensor]] = {}
    summed: dict[tuple[str, int], Tensor] = {}
    gathered: dict[tuple[str, int], list[tuple[int, ...]]] = {}
    for name, statistic in table.own.items():
        for number, side in enumerate((statistic.inputs, statistic.outputs)):
            shapes = [each[number] for each in table.shapes[name]]
            groups, _, features = side.shape
            if sum(rows for _, rows, _ in shapes) < features:
                gathered[name, number] = [(groups, rows, features) for _, rows, _ in shapes]
            else:
                summed[name, number] = side if side.shape[1] == features else side.mT @ side
    totals = ranks.exchange.total([triangle(moment) for moment in summed.values()])
    for (key, moment), total in zip(summed.items(), totals, strict=True):
        kept[key] = [symmetric(total, moment.shape[-1])]
    own = [(table.own[name].inputs, table.own[name].outputs)[number] for name, number in gathered]
    for key, parts in zip(gathered, ranks.exchange.everyone(own, list(gathered.values())), strict=True):
        kept[key] = parts
    return {name: table.counted(name, *(merge(kept[name, number]) for number in (0, 1))) for name in table.own}


def shared_out(
    costs: Mapping[str, float], compute: Callable[[str], dict[str, Tensor]], ranks: Ranks
) -> dict[str, dict[str, Tensor]]:
    """Returns what `compute` gives of each layer, computed by one process and sent to the others.

    The dearest layers are given away first, each to the process that has least to do. Layers that only some processes
    have in `costs` may be missing; who needs them computes them.
    """
    exchange = ranks.exchange
    work = [0.0] * exchange.world
    own: dict[str, dict[str, Tensor]] = {}
    for layer in sorted(costs, key=lambda each: (-costs[each], each)):
        worker = work.index(min(work))
        work[worker] += costs[layer]
        if worker == exchange.rank:
            own[layer] = compute(layer)
    sent = {layer: {name: tensor.cpu() for name, tensor in state.items()} for layer, state in own.items()}
    exchange.bytes_sent += sum(tensor.nbytes for state in sent.values() for tensor in state.values())
    found: dict[str, dict[str, Tensor]] = {}
    for each in exchange.everyone_says(sent):
        found |= {layer: {name: t.to(ranks.device) for name, t in state.items()} for layer, state in each.items()}
    return {**found, **own}


class _Table:
    """What every process knows of every process's statistics, and `own`: this one's, zeros for what it has not met."""

    def __init__(self, found: Found, ranks: Ranks, *, rows: bool) -> None:
        self.own: dict[str, Statistics] = {}
        self.shapes: dict[str, list[list[tuple[int, ...]]]] = {}
        self._counts: dict[str, tuple[int, int, bool]] = {}
        everyone = ranks.exchange.table([_described(found.get(layer)) for layer in ranks.layers], ranks.device)
        for layer, *entries in zip(ranks.layers, *everyone, strict=True):
            met = next((entry for entry in entries if entry[0]), None)
            if met is None:
                continue
            samples, positions = (sum(entry[column] for entry in entries) for column in (0, 1))
            self._counts[layer] = samples, positions, bool(met[2])
            nothing = [(shape[0], 0, shape[-1]) if rows else shape for shape in _shapes(met)]
            self.shapes[layer] = [_shapes(entry) if entry[0] else nothing for entry in entries]
            own = found.get(layer)
            if own is None:
                inputs, outputs = (torch.zeros(shape, dtype=DTYPES[met[3]], device=ranks.device) for shape in nothing)
                own = Statistics(inputs, outputs, 0, 0, bool(met[2]))
            elif ranks.mean:
                share = own.samples / samples
                own = replace(own, outputs=own.outputs * (share**2 if _is_moment(own.outputs) else share))
            self.own[layer] = own

    def counted(self, layer: str, inputs: Tensor, outputs: Tensor) -> Statistics:
        return Statistics(inputs, outputs, *self._counts[layer])


def _is_moment(side: Tensor) -> bool:
    return side.dim() == 3 and side.shape[1] == side.shape[2]


def _described(statistics: Statistics | None) -> list[int]:
    """COLUMNS integers; shapes are padded with 0 to three axes."""
    if statistics is None:
        return [0] * COLUMNS
    shapes = [(*side.shape, 0)[:3] for side in (statistics.inputs, statistics.outputs)]
    precision = DTYPES.index(statistics.inputs.dtype)
    return [statistics.samples, statistics.rows, int(statistics.convolution), precision, *shapes[0], *shapes[1]]


def _shapes(row: list[int]) -> list[tuple[int, ...]]:
    return [tuple(row[a:b]) if row[b - 1] else tuple(row[a : b - 1]) for a, b in pairwise((4, 7, COLUMNS))]
