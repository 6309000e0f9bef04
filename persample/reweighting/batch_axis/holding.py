"""What calls of layers hold of a batch whose rows data place: read off the indices, for this batch alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from persample.attribution.owner import NOBODY
from persample.attribution.proof.walk import Places
from persample.errors import UnsupportedError
from persample.graph.nodes import Edge, edge_shape
from persample.reweighting.autograd import Pass, Uses
from persample.reweighting.batch_axis.folded import Reading
from persample.reweighting.batch_axis.output_graph import OutputGraph, elsewhere, segment_of
from persample.reweighting.batch_axis.segments import Held, Listed
from persample.reweighting.layer import Layer


def hold(behind: OutputGraph, uses: Mapping[Layer, Uses], left: Collection[Layer]) -> set[Layer]:
    """Notes what calls of the layers `left` hold, of which it is known for every call; returns these.

    A layer whose rows lie in a pattern, and not where data say, is settled for all batches of these shapes.
    """
    found = {layer: held for layer, held in _held(behind, uses).items() if layer in left}
    for layer, held in found.items():
        taps = (each() for each in uses[layer].taps)
        shape, *others = {edge_shape((tap, 0)) for tap in taps if tap in behind.graph.order}
        reading, *more = {_reading(each, layer, shape, behind.batch) for each in held.values()}
        if layer.provable and reading is not None and not others and not more:
            layer.settle(shape, behind.batch, reading)
        else:
            uses[layer].held = held
    return set(found)


def count_by_output(output: Any, uses: Mapping[Layer, Uses], forward: Pass) -> bool:
    """Counts samples by the rows of the output, where each is made of several rows of the input: nodes of graphs, say.

    That is so where the output has fewer rows and cannot hold as many samples as the input, and the graph tells of
    every call of every layer which row of the output it is for. Returns whether it did.
    """
    behind = None if forward.batch is None else OutputGraph.counting(output, forward.batch)
    if behind is None or forward.batch is None or behind.batch >= forward.batch:
        return False
    held = _held(behind, uses)
    together = any(isinstance(each, Listed) and _several(each) for calls in held.values() for each in calls.values())
    if not together or held.keys() != uses.keys():
        return False
    forward.batch = behind.batch
    for layer, each in held.items():
        uses[layer].held = each
    return True


def _several(rows: Listed) -> bool:
    """Whether a sample has several rows."""
    ids = rows.ids[rows.ids != NOBODY]
    return len(ids.unique()) < len(ids)


def _held(behind: OutputGraph, uses: Mapping[Layer, Uses]) -> dict[Layer, dict[int, Held]]:
    """What the calls of layers hold of this batch, of those of which it is known for every call.

    Nothing is returned where the samples would lie along features, or space: the output is read wrongly.
    """
    try:
        found = behind.places()
    except UnsupportedError:
        return {}
    result: dict[Layer, dict[int, Held]] = {}
    for layer, each in uses.items():
        taps = {number: tap() for number, tap in enumerate(each.taps)}
        met = {number: (tap, 0) for number, tap in taps.items() if tap in behind.graph.order}
        if any(_off(layer, found, edge) for edge in met.values()):
            return {}
        held = {number: _of_call(layer, found, edge) for number, edge in met.items()}
        known = {number: one for number, one in held.items() if one is not None}
        if known and len(known) == len(held):
            result[layer] = known
    return result


def _of_call(layer: Layer, found: Places, edge: Edge) -> Held | None:
    shape = edge_shape(edge)
    place, rows = found.known.get(edge), found.listed.get(edge)
    if rows is not None:
        return Listed(rows.axis, rows.ids)
    return None if place is None else segment_of(place, shape, layer)


def _off(layer: Layer, found: Places, edge: Edge) -> bool:
    """Whether the samples would lie along features, or space."""
    shape = edge_shape(edge)
    place, rows = found.known.get(edge), found.listed.get(edge)
    if rows is not None:
        return rows.axis >= len(layer.rows(shape))
    return place is not None and elsewhere(place, shape, layer)


def _reading(held: Held, layer: Layer, shape: tuple[int, ...], batch: int) -> Reading | None:
    """The pattern that all samples lie in; None where they do not."""
    if not isinstance(held, Listed):
        return held.reading if (held.first, held.count) == (0, batch) else None
    ids = held.ids.tolist()
    for each in layer.candidates(shape, batch):
        if each.axis == held.axis and ids == [row // each.after % batch for row in range(len(ids))]:
            return each
    return None
