"""Models that take time first, [T, B, …]: recognised by what they mix, or by the losses that are made of their output.

That a first tensor is [T, B] and not [B, T] no size says. Two things do:

    the model    entries of axis 0 influence each other (attention, recurrence), those of axis 1 nowhere do
    the losses   [n], before their mean or sum is taken: one loss for each entry of axis 1, and not of axis 0

The first goes by itself. Where a model keeps the entries of both axes apart, the losses of the first backward pass are
looked at, and if they speak against axis 0, a warning says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from persample.errors import UnsupportedError
from persample.folded import foldings
from persample.graph import Edge, Graph, Node, edge_shape, trace
from persample.layout import leading_to
from persample.output_graph import Calls, calls_of, readable, start, trace_all
from persample.places import SEVERAL, Place, Places, places
from persample.provenance import tensors_of
from persample.taps import Uses
from persample.weights import Layer

_MIXING = (
    "ScaledDotProduct", "Softmax", "Cumsum", "Convolution", "Addmm", "Mm", "Bmm", "Baddbmm", "CudnnRnn", "MiopenRnn",
    "MkldnnRnnLayer", SEVERAL,
)  # fmt: skip
"""By which operations an entry of a sequence influences others. Statistics of a batch (mean, variance) are none."""


class Ends(NamedTuple):
    """The tensors of a model's output that begin with the first two axes of its first input, [steps, samples, …]."""

    graph: Graph
    leaves: list[Tensor]
    sizes: tuple[int, int]

    @classmethod
    def of(cls, output: Any, sizes: tuple[int, int]) -> Ends | None:
        """Of an output; None where there are none, or no graph that can be read."""
        leaves = [each for each in tensors_of(output) if readable(each) and each.shape[:2] == sizes]
        try:
            return cls(trace_all(leaves), leaves, sizes) if leaves else None
        except UnsupportedError:  # a reentrant checkpoint, nested tensors
            return None

    def along(self, axis: int) -> dict[Edge, Place]:
        """Where samples lie if they lie along that axis."""
        return {(leaf.grad_fn, leaf.output_nr): start(leaf.shape, axis, self.sizes[axis]) for leaf in self.leaves}


def by_output(output: Any, steps: int, samples: int, uses: Mapping[Layer, Uses]) -> bool:
    """Whether a model that is given a first tensor [steps, samples, …] takes time first, by what it returns.

    So it does where nothing of that can hold `steps` samples, but an axis before the third can hold `samples`, from
    which it is proven of every call of every layer where they lie: of the last step, or of another sequence.
    """
    leaves = [each for each in tensors_of(output) if readable(each)]
    along = [(leaf, axis) for leaf in leaves for axis in (1, 0) if leaf.shape[axis : axis + 1] == (samples,)][:1]
    if not along or any(foldings(leaf.shape, steps) for leaf in leaves):
        return False
    [(leaf, axis)] = along
    starts = {(leaf.grad_fn, leaf.output_nr): start(leaf.shape, axis, samples)}
    try:
        proven = calls_of(uses, trace(leaf), starts, samples)
    except UnsupportedError:
        return False
    found = list((proven or {}).values())
    return bool(found) and all(each.shapes and each.proven.keys() == each.shapes.keys() for each in found)


def by_model(ends: Ends) -> bool | None:
    """Whether a model takes time first, by what it mixes; None where it mixes entries of neither axis."""
    try:
        steps, samples = (places(ends.graph, ends.along(axis), ends.sizes[axis]) for axis in (0, 1))
    except UnsupportedError:
        return False
    if _mixed(samples, steps):
        return False
    mixing = [kind.startswith(_MIXING) for kind in _mixed(steps, samples)]
    return all(mixing) if mixing else None


def _mixed(here: Places, there: Places) -> list[str]:
    """By what entries are mixed along one axis where they are apart along the other."""
    # What all of one step depends on, as its copy of a weight, says nothing of samples.
    return [kind for edge, kind in here.mixed.items() if edge in there.known and there.known[edge].count > 1]


class Question:
    """Whether the losses of a backward pass are one for each entry of axis 1 of the model's output, and not of axis 0.

    It holds nothing of the graph, which it belongs to.
    """

    def __init__(self, ends: Ends, uses: Mapping[Layer, Uses]) -> None:
        self._uses = {layer: ref(each) for layer, each in uses.items()}
        self._samples = ends.sizes[1]
        self._ways = [calls_of(uses, ends.graph, ends.along(axis), ends.sizes[axis]) for axis in (0, 1)]

    def answer(self) -> dict[Layer, Calls] | None:
        """What is proven of the layers if they are; None where nothing says so. To be called in the backward pass."""
        uses = {
            layer: each for layer, each in ((layer, use()) for layer, use in self._uses.items()) if each is not None
        }
        taps = {tap() for each in uses.values() for tap in each.taps} - {None}
        by_steps, by_samples = self._ways
        for root in _roots() if by_samples is not None and by_samples != by_steps else ():
            try:
                graph = trace(root)
                ends = _unreduced(graph, root, taps & graph.order.keys())
                if ends and all(edge_shape(edge) == (self._samples,) for edge in ends):
                    places_of_losses = {edge: Place(1, 0, self._samples) for edge in ends}
                    if calls_of(uses, graph, places_of_losses, self._samples) == by_samples:
                        return by_samples
            except UnsupportedError:
                pass
        return None


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
