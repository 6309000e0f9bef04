"""Which rows of a layer's output belong to which sample of the model's output: read from the graph between the two.

No loss is needed: where the samples lie in the output, their sizes tell, or else a trial
(`persample.reweighting.batch_axis.dry_run`) does; and `persample.reweighting.batch_axis.places` proves from there where
they lie at each call of each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from persample.attribution.owner import Owner
from persample.attribution.probing import attribute
from persample.attribution.proof.batching_rules import BATCHING_RULES, AxisLayout, Step
from persample.attribution.proof.layouts import Place, Shape
from persample.attribution.proof.walk import Places, places
from persample.errors import UnsupportedError
from persample.graph.nodes import Edge, Graph, Node, edge_shape, trace
from persample.graph.provenance import tensors_of
from persample.reweighting.autograd import Uses
from persample.reweighting.batch_axis.folded import Reading, by_size, foldings
from persample.reweighting.batch_axis.segments import Segment
from persample.reweighting.layer import Layer


class Calls(NamedTuple):
    """What is proven of the calls of a layer in a forward pass."""

    number: int
    """How many there were."""
    shapes: dict[int, Shape]
    """Of the outputs, for those calls on which the output depends: first call 0."""
    proven: dict[int, Segment]


class Way(NamedTuple):
    """A way to read a model's output, and what it proves."""

    choice: Reading | None
    """How to read what is doubtful of it."""
    proven: dict[Layer, Calls]


@dataclass
class OutputGraph:
    """The graph behind the output of a forward pass, of `batch` samples."""

    graph: Graph
    leaves: list[Tensor]
    batch: int
    axis: int | None = None
    """Which axis counts samples, where that is known: in models that take time first."""

    @classmethod
    def behind(cls, output: Any, batch: int, axis: int | None = None) -> OutputGraph | None:
        """Of a model's output; None where there is no graph, or none that can be read."""
        leaves = [each for each in tensors_of(output) if readable(each) and foldings(each.shape, batch)]
        try:
            return cls(trace_all(leaves), leaves, batch, axis) if leaves else None
        except UnsupportedError:  # a reentrant checkpoint, nested tensors
            return None

    @classmethod
    def counting(cls, output: Any, rows: int) -> OutputGraph | None:
        """Of an output that cannot hold so many samples, its own rows being samples; None where that may not be."""
        leaves = [each for each in tensors_of(output) if readable(each) and each.dim()]
        counts = {len(each) for each in leaves}
        if len(counts) != 1 or max(counts) < 2 or any(foldings(each.shape, rows) for each in leaves):
            return None
        try:
            return cls(trace_all(leaves), leaves, max(counts), 0)
        except UnsupportedError:  # a reentrant checkpoint, nested tensors
            return None

    @cached_property
    def doubtful(self) -> tuple[Shape, list[Reading]] | None:
        """The first shape in the output that can be read in several ways, and these; None where there is none."""
        for leaf in self.leaves:
            if self._reading(leaf) is None:
                return tuple(leaf.shape), foldings(leaf.shape, self.batch)
        return None

    def ways(self, uses: Mapping[Layer, Uses]) -> dict[Reading | None, Way]:
        """Returns what is proven of each layer, by the reading of what is doubtful; None where nothing is."""
        choices = [None] if self.doubtful is None else self.doubtful[1]
        ways = {choice: self._read(uses, choice) for choice in choices if uses}
        return {choice: Way(choice, found) for choice, found in ways.items() if found is not None}

    def _reading(self, leaf: Tensor) -> Reading | None:
        if self.axis is not None and leaf.shape[self.axis : self.axis + 1] == (self.batch,):
            return Reading(1, 1, self.axis)
        return by_size(foldings(leaf.shape, self.batch))

    def _read(self, uses: Mapping[Layer, Uses], choice: Reading | None) -> dict[Layer, Calls] | None:
        return calls_of(uses, self.graph, self._places_of_output(choice), self.batch)

    def _places_of_output(self, choice: Reading | None) -> dict[Edge, Place]:
        return {
            (leaf.grad_fn, leaf.output_nr): start(leaf.shape, at.axis, self.batch, at.after)
            for leaf, at in self._starts(choice)
        }

    def _starts(self, choice: Reading | None) -> list[tuple[Tensor, Reading]]:
        pairs = []
        for leaf in self.leaves:
            doubtful = self.doubtful is not None and leaf.shape == self.doubtful[0]
            at = choice if doubtful else self._reading(leaf)
            if at is not None:
                pairs.append((leaf, at))
        return pairs

    def by_size(self) -> dict[Shape, Reading]:
        """How the tensors of the output are read, by their shapes."""
        return {tuple(leaf.shape): each for leaf in self.leaves if (each := self._reading(leaf)) is not None}

    def places(self) -> Places:
        """Whose the rows of everything before the output are in this batch, where the output is read by its size."""
        return placed(self.graph, self._places_of_output(None), self.batch, routed=True)

    def ask(self, nodes: Sequence[Node], choice: Reading | None) -> list[Owner | None]:
        """Returns whose each entry of these nodes' outputs is, in this batch, by passes of weighted pseudo-losses."""
        starts = self._starts(choice)
        ends = [leaf for leaf, _ in starts]
        generator = torch.Generator().manual_seed(0)
        noise = [torch.rand(end.shape, generator=generator).to(end).add(0.5) for end in ends]

        def backward(weights: Tensor) -> Sequence[Any]:
            rows = [at.rows(weights.to(end.dtype), end.dim()) for end, at in starts]
            grads = [each * row for each, row in zip(noise, rows, strict=True)]
            edges = [GradientEdge(node, 0) for node in nodes]
            return torch.autograd.grad(ends, edges, grads, retain_graph=True, allow_unused=True)

        return attribute(backward, torch.ones(self.batch, dtype=ends[0].dtype, device=ends[0].device))[1]


def trace_all(ends: Sequence[Tensor]) -> Graph:
    """Returns the graph behind several tensors."""
    return trace(ends[0] if len(ends) == 1 else torch.stack([each.sum().float() for each in ends]))


def start(shape: Shape, axis: int, batch: int, after: int = 1) -> Place:
    """Samples along an axis of an output, `after` consecutive rows each."""
    return Place(after * prod(shape[axis + 1 :]), 0, batch)


def calls_of(
    uses: Mapping[Layer, Uses], graph: Graph, starts: Mapping[Edge, Place], batch: int
) -> dict[Layer, Calls] | None:
    """Returns what is proven of each layer if these are places of the samples; None where they cannot be."""
    try:
        found = placed(graph, starts, batch).known
    except UnsupportedError:
        return None
    result: dict[Layer, Calls] = {}
    for layer, each in uses.items():
        taps = [tap() for tap in each.taps]
        shapes = {number: edge_shape((tap, 0)) for number, tap in enumerate(taps) if tap in graph.order}
        there = {number: found.get((taps[number], 0)) for number in shapes}
        laid_out = {number: place for number, place in there.items() if place is not None}
        if any(elsewhere(place, shapes[number], layer) for number, place in laid_out.items()):
            return None
        segments = {number: segment_of(place, shapes[number], layer) for number, place in laid_out.items()}
        proven = {number: segment for number, segment in segments.items() if segment is not None}
        result[layer] = Calls(len(taps), shapes, proven)
    return result


def _keeping_rows(step: Step) -> AxisLayout | None:
    """What flows through sample b's rows of a batch normalisation is taken for b's."""
    return step.kept() if step.slot == 0 and step.at.axis in (0, 1) else None


_KEEPING = {**BATCHING_RULES, **{f"{name}BatchNormBackward0": _keeping_rows for name in ("Native", "Cudnn", "Miopen")}}


def placed(graph: Graph, starts: Mapping[Edge, Place], batch: int, *, routed: bool = False) -> Places:
    """`places`, through batch normalisation, too."""
    return places(graph, starts, batch, batching_rules=_KEEPING, routed=routed)


def readable(output: Tensor) -> bool:
    """Whether there is a graph behind a tensor, and its axes say something."""
    strided = output.layout is torch.strided and not output.is_nested
    return strided and output.grad_fn is not None and output.is_floating_point()


def elsewhere(place: Place, shape: Shape, layer: Layer) -> bool:
    """Whether the samples would lie along features, or space."""
    at = None if place.count == 1 else place.axis_layout(shape)
    return at is not None and at.axis >= len(layer.rows(shape))


def segment_of(place: Place, shape: Shape, layer: Layer) -> Segment | None:
    if place.count == 1:
        return Segment(shape, Reading(1, shape[0] if layer.rows(shape) else 1, 0), place.first, 1)
    at = place.axis_layout(shape)
    if at is None:
        return None
    before = shape[at.axis] // (place.count * at.inner)
    return Segment(shape, Reading(before, at.inner, at.axis), place.first, place.count)
