"""Which rows of a layer's output belong to which sample of the model's output: read from the graph between the two.

No loss is needed: where the samples lie in the output, their sizes tell, or else a trial (`persample.trial`) does; and
`persample.places` proves from there where they lie at each call of each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from persample.errors import UnsupportedError
from persample.folded import Reading, by_size, foldings
from persample.graph import Edge, Graph, edge_shape, trace
from persample.places import Place, Shape, places
from persample.provenance import tensors_of
from persample.segments import Segment
from persample.taps import Uses
from persample.weights import Layer


class Calls(NamedTuple):
    """What is proven of the calls of a layer in a forward pass."""

    number: int
    """How many there were."""
    shapes: dict[int, Shape]
    """Of the outputs, for those calls on which the output depends: first call 0."""
    proven: dict[int, Segment]


@dataclass
class OutputGraph:
    """The graph behind the output of a forward pass, of `batch` samples."""

    graph: Graph
    leaves: list[Tensor]
    batch: int

    @classmethod
    def behind(cls, output: Any, batch: int) -> OutputGraph | None:
        """Of a model's output; None where there is no graph, or none that can be read."""
        leaves = [each for each in tensors_of(output) if _readable(each) and foldings(each.shape, batch)]
        if not leaves:
            return None
        try:
            end = leaves[0] if len(leaves) == 1 else torch.stack([each.sum().float() for each in leaves])
            return cls(trace(end), leaves, batch)
        except UnsupportedError:  # a reentrant checkpoint, nested tensors
            return None

    @cached_property
    def doubtful(self) -> tuple[Shape, list[Reading]] | None:
        """The first shape in the output that can be read in several ways, and these; None where there is none."""
        for leaf in self.leaves:
            readings = foldings(leaf.shape, self.batch)
            if by_size(readings) is None:
                return tuple(leaf.shape), readings
        return None

    def ways(self, uses: Mapping[Layer, Uses]) -> dict[Reading | None, dict[Layer, Calls]]:
        """Returns what is proven of each layer, by the reading of what is doubtful; None where nothing is."""
        choices = [None] if self.doubtful is None else self.doubtful[1]
        ways = {choice: self._read(uses, choice) for choice in choices if uses}
        return {choice: found for choice, found in ways.items() if found is not None}

    def _read(self, uses: Mapping[Layer, Uses], choice: Reading | None) -> dict[Layer, Calls] | None:
        """Returns what is proven if what is doubtful is to be read so; None where it cannot be."""
        taps = {layer: [tap() for tap in each.taps] for layer, each in uses.items()}
        targets = {tap for each in taps.values() for tap in each if tap in self.graph.order}
        starts: dict[Edge, Place] = {}
        for leaf in self.leaves:
            doubtful = self.doubtful is not None and leaf.shape == self.doubtful[0]
            at = choice if doubtful else by_size(foldings(leaf.shape, self.batch))
            if at is not None:
                stride = at.after * prod(leaf.shape[at.axis + 1 :])
                starts[leaf.grad_fn, leaf.output_nr] = Place(stride, 0, self.batch)
        try:
            found = places(self.graph, starts, targets, self.batch)
        except UnsupportedError:
            return None
        result: dict[Layer, Calls] = {}
        for layer, each in taps.items():
            shapes = {number: edge_shape((tap, 0)) for number, tap in enumerate(each) if tap in targets}
            there = {number: found.get(each[number]) for number in shapes}
            lying = {number: place for number, place in there.items() if place is not None}
            if any(_elsewhere(place, shapes[number], layer) for number, place in lying.items()):
                return None
            segments = {number: _segment(place, shapes[number], layer) for number, place in lying.items()}
            proven = {number: segment for number, segment in segments.items() if segment is not None}
            result[layer] = Calls(len(each), shapes, proven)
        return result


def _readable(output: Tensor) -> bool:
    strided = output.layout is torch.strided and not output.is_nested
    return strided and output.grad_fn is not None and output.is_floating_point()


def _elsewhere(place: Place, shape: Shape, layer: Layer) -> bool:
    """Whether the samples would lie along features, or space."""
    at = None if place.count == 1 else place.lying(shape)
    return at is not None and at.axis >= len(layer.rows(shape))


def _segment(place: Place, shape: Shape, layer: Layer) -> Segment | None:
    if place.count == 1:
        return Segment(shape, Reading(1, shape[0] if layer.rows(shape) else 1, 0), place.first, 1)
    at = place.lying(shape)
    if at is None:
        return None
    before = shape[at.axis] // (place.count * at.inner)
    return Segment(shape, Reading(before, at.inner, at.axis), place.first, place.count)
