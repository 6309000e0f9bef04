"""Models that take time first, [T, B, …]: recognised by what they mix, or by the losses that are made of their output.

That a first tensor is [T, B] and not [B, T] no size says. Two things do:

    the model    entries of axis 0 influence each other (attention, recurrence), those of axis 1 nowhere do
    the losses   [n], before their mean or sum is taken: one loss for each entry of axis 1, and not of axis 0

The first goes by itself, and so does the second where these are the entries of axis 0 of what the model returns: it
has put samples in front. Where they are those of axis 1 of that, and the model keeps the entries of both axes apart,
the losses may as well be sums over a batch that is in front, as it usually is: a warning says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from types import FrameType
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from persample.attribution.proof.layouts import Place
from persample.attribution.proof.proven import leading_to
from persample.attribution.proof.walk import SEVERAL, Places
from persample.errors import UnsupportedError
from persample.graph.nodes import Edge, Graph, Node, edge_shape, trace
from persample.graph.provenance import tensors_of
from persample.reweighting.autograd import Tap, Uses
from persample.reweighting.batch_axis.folded import foldings
from persample.reweighting.batch_axis.output_graph import Calls, calls_of, placed, readable, start, trace_all
from persample.reweighting.layer import Layer

_MIXING = (
    "ScaledDotProduct", "Softmax", "Cumsum", "Convolution", "Addmm", "Mm", "Bmm", "Baddbmm", "CudnnRnn", "MiopenRnn",
    "MkldnnRnnLayer", SEVERAL,
)  # fmt: skip
"""By which operations an entry of a sequence influences others. Statistics of a batch (mean, variance) are none."""


class Ends(NamedTuple):
    """The tensors of a model's output whose first two axes are those of its first input, [steps, samples, …]."""

    graph: Graph
    leaves: list[Tensor]
    sizes: tuple[int, int]
    axes: tuple[int, int]
    """Which of them counts steps, and which samples; as in the input, where the sizes are the same."""

    @classmethod
    def of(cls, output: Any, sizes: tuple[int, int]) -> Ends | None:
        """Of an output; None where there are none, or no graph that can be read."""
        for axes in ((0, 1), (1, 0)):
            shape = sizes[axes[0]], sizes[axes[1]]
            leaves = [each for each in tensors_of(output) if readable(each) and each.shape[:2] == shape]
            if leaves:
                try:
                    return cls(trace_all(leaves), leaves, sizes, axes)
                except UnsupportedError:  # a reentrant checkpoint, nested tensors
                    return None
        return None

    def along(self, which: int) -> dict[Edge, Place]:
        """Where they lie: 0 the steps, 1 the samples."""
        axis, size = self.axes[which], self.sizes[which]
        return {(leaf.grad_fn, leaf.output_nr): start(leaf.shape, axis, size) for leaf in self.leaves}


def by_output(output: Any, steps: int, samples: int, uses: Mapping[Layer, Uses]) -> int | None:
    """The axis of the output that counts samples, if it tells that a model, given [steps, samples, …], has time first.

    So it does where nothing of it can hold `steps` samples, but an axis before the third can hold `samples`, from
    which it is proven of every call of every layer where they lie: of the last step, or of another sequence.
    """
    leaves = [each for each in tensors_of(output) if readable(each)]
    along = [(leaf, axis) for leaf in leaves for axis in (1, 0) if leaf.shape[axis : axis + 1] == (samples,)][:1]
    if not along or any(foldings(leaf.shape, steps) for leaf in leaves):
        return None
    [(leaf, axis)] = along
    starts = {(leaf.grad_fn, leaf.output_nr): start(leaf.shape, axis, samples)}
    try:
        proven = calls_of(uses, trace(leaf), starts, samples)
    except UnsupportedError:
        return None
    found = list((proven or {}).values())
    sure = bool(found) and all(each.shapes and each.proven.keys() == each.shapes.keys() for each in found)
    return axis if sure else None


def by_model(ends: Ends) -> bool | None:
    """Whether a model takes time first, by what it mixes; None where that does not tell."""
    try:
        steps, samples = (placed(ends.graph, ends.along(which), ends.sizes[which]) for which in (0, 1))
    except UnsupportedError:
        return None
    data = _of_data(ends.graph, prod(ends.sizes))
    of_steps, of_samples = _mixed(steps, samples, data), _mixed(samples, steps, data)
    if any(kind.startswith(_MIXING) for kind in of_samples):
        return None if of_steps and ends.sizes[0] == ends.sizes[1] else False
    sure = of_steps and not of_samples and all(kind.startswith(_MIXING) for kind in of_steps)
    return True if sure else None


def _mixed(here: Places, there: Places, data: set[Node]) -> list[str]:
    """By what entries are mixed along one axis where they are apart along the other."""
    # What all of one step depends on, as its copy of a weight, says nothing of samples.
    return [
        kind
        for edge, kind in here.mixed.items()
        if edge[0] in data and edge in there.known and there.known[edge].count > 1
    ]


def _of_data(graph: Graph, entries: int) -> set[Node]:
    """The nodes that data flow through, and not weights alone: one that has an own value at each position goes with
    those of every sample, and mixes nothing. So does a table of positions, which is not looked up for each entry."""
    found: set[Node] = set()
    for node in graph.order:
        kind, sources = node.name(), [source for source, _ in node.next_functions]
        own = getattr(node, "_forward_cls", None) is Tap or (None in sources and kind.startswith(_MIXING))
        own = own or (kind.startswith("Embedding") and prod(edge_shape((node, 0))[:-1]) % entries == 0)
        if own or any(source in found for source in sources):
            found.add(node)
    return found


class Question:
    """Whether the losses of a backward pass are one for each of so many samples, which lie elsewhere than it was read.

    It holds nothing of the graph, which it belongs to.

    Arguments:
        output: of the model.
        samples: how many.
        uses: of the layers.
        axes: of the output, that may count samples.
    """

    def __init__(self, output: Any, samples: int, uses: Mapping[Layer, Uses], axes: Sequence[int]) -> None:
        self._uses = {layer: ref(each) for layer, each in uses.items()}
        self._samples = samples
        self._ends: dict[tuple[int, int], dict[int, Place]] = {}  # of nodes the graph makes new objects
        for leaf in tensors_of(output):
            fitting = [axis for axis in axes if readable(leaf) and leaf.shape[axis : axis + 1] == (samples,)]
            if fitting and leaf.grad_fn is not None:
                number = leaf.grad_fn._sequence_nr(), leaf.output_nr
                self._ends[number] = {axis: start(leaf.shape, axis, samples) for axis in fitting}

    def answer(self, batch: int | None) -> tuple[int, dict[Layer, Calls]] | None:
        """The axis of the output that counts them, and what is proven of the layers; None where nothing says so.

        To be called in the backward pass.

        Arguments:
            batch: as many samples as the layers are read by.
        """
        uses = {
            layer: each for layer, each in ((layer, use()) for layer, use in self._uses.items()) if each is not None
        }
        taps = {tap() for each in uses.values() for tap in each.taps} - {None}
        for root in _roots() if self._ends else ():
            try:
                graph = trace(root)
                ends = _unreduced(graph, root, taps & graph.order.keys())
                if ends and all(edge_shape(edge) == (self._samples,) for edge in ends):
                    laid_out = {edge: Place(1, 0, self._samples) for edge in ends}
                    axis = self._axis(placed(graph, laid_out, self._samples))
                    proven = None if axis is None else calls_of(uses, graph, laid_out, self._samples)
                    if axis is not None and proven and self._news(proven, batch):
                        return axis, proven
            except UnsupportedError:
                pass
        return None

    def _axis(self, found: Places) -> int | None:
        """The axis of the output along which the samples of the losses lie."""
        for (node, number), place in found.known.items():
            for axis, end in self._ends.get((node._sequence_nr(), number), {}).items():
                if end == place:
                    return axis
        return None

    def _news(self, proven: Mapping[Layer, Calls], batch: int | None) -> bool:
        """Whether layers are read otherwise than that."""
        if not any(calls.proven for calls in proven.values()):
            return batch != self._samples
        return any(_otherwise(layer, calls, batch, self._samples) for layer, calls in proven.items())


def _otherwise(layer: Layer, calls: Calls, batch: int | None, samples: int) -> bool:
    """Whether one of a layer's calls is read otherwise than it is proven."""
    taken = {
        number: layer.taken(batch, calls.number, number, segment.shape) for number, segment in calls.proven.items()
    }
    return any(
        each is not None and (batch != samples or each != calls.proven[number]) for number, each in taken.items()
    )


def _roots() -> Iterator[Tensor]:
    """The tensors at which backward passes of this process begin: the engine does not say, its callers in Python do."""
    begin = getattr(torch.autograd.graph, "_engine_run_backward", None)
    for frame in [sys._getframe(), *sys._current_frames().values()]:  # devices have threads of their own
        at: FrameType | None = frame
        while at is not None:
            if begin is not None and at.f_code is begin.__code__:
                given = at.f_locals.get("t_outputs", ())
                yield from (each for each in given if isinstance(each, Tensor) and each.grad_fn is not None)
            at = at.f_back


def _unreduced(graph: Graph, root: Tensor, taps: set[Node]) -> list[Edge]:
    """Where, on the way from a root to a Tap, there is more than one entry for the first time."""
    leading = leading_to(graph, taps)
    stack: list[tuple[Any, int]] = [(root.grad_fn, root.output_nr)]
    seen: set[Edge] = set()
    found: list[Edge] = []
    while stack:
        edge = stack.pop()
        if edge[0] not in leading or edge in seen:
            continue
        seen.add(edge)
        if edge_shape(edge) in ((), (1,)):
            stack.extend(each for each in edge[0].next_functions if each[0] is not None)
        else:
            found.append(edge)
    return found
