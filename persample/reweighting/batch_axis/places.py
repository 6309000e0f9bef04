"""Which samples of a model's output lie where in what came before it, proven from the kinds of operations alone.

As in `persample.attribution.proof`, but from outputs, and through operations that cut the samples apart or join them:

    entry i, counted in row-major order, belongs to sample  first + (i // stride) mod count

    layer(x[2:4])                   rows 0 1 are samples 2 3                  first 2, count 2
    layer(x[2]), [T, D]             all of it is sample 2's                   first 2, count 1
    torch.cat([layer(a), layer(b)]), torch.stack, split, chunk, unbind, x[i]  cut and join

What is cut is put together again where the cuts agree; where they do not, and behind operations that are not known,
nothing is proven. Batch normalisation counts as keeping rows: what flows through sample b's rows is taken for b's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch.nn.modules._functions import BackwardHookFunction

from persample.attribution.proof import PASSAGES, Lying, Step, lying, stride_of
from persample.graph.nodes import Edge, Graph, Node, edge_shape
from persample.graph.routes import REARRANGING
from persample.reweighting.autograd import Tap

Shape = tuple[int, ...]
SEVERAL = "several"


@dataclass(frozen=True)
class Place:
    """Which samples a tensor holds, and where: entry i belongs to sample first + (i // stride) mod count."""

    stride: int
    first: int
    count: int

    def lying(self, shape: Shape) -> Lying | None:
        """The axis along which its samples lie."""
        return lying(self.stride, shape, self.count)


@dataclass(frozen=True)
class _Slab:
    """A part of a tensor, of `length` along `dim` from `start` on, and whose it is."""

    dim: int
    start: int
    length: int
    place: Place

    def shape(self, of: Shape) -> Shape:
        """Its shape in a tensor of that shape."""
        return (*of[: self.dim], self.length, *of[self.dim + 1 :])

    def agrees(self, place: Place, shape: Shape) -> bool:
        """Whether it is this part's, if the tensor is of that shape and place."""
        return cut(place, shape, self.dim, self.start, self.length) == self.place


def whole(first: int, shape: Shape) -> Place:
    """Everything belongs to one sample."""
    return Place(max(1, prod(shape)), first, 1)


def cut(place: Place, shape: Shape, dim: int, start: int, length: int) -> Place | None:
    """Whose a part of a tensor is; None where it is not one run of samples."""
    part = (*shape[:dim], length, *shape[dim + 1 :])
    if place.count == 1:
        return whole(place.first, part)
    at = place.lying(shape)
    if not length:
        return None
    if at is None:
        return _cut_over_axes(place, shape, dim, start, length)
    if at.axis != dim:
        return Place(stride_of(at, part), place.first, place.count)
    if start % at.inner or length % at.inner:
        return None
    begin, number = start // at.inner, length // at.inner
    below = stride_of(at, part)
    if begin % place.count == 0 and number % place.count == 0:
        return Place(below, place.first, place.count)
    if begin // place.count != (begin + number - 1) // place.count:
        return None
    first = place.first + begin % place.count
    return whole(first, part) if number == 1 else Place(below, first, number)


def _cut_over_axes(place: Place, shape: Shape, dim: int, start: int, length: int) -> Place | None:
    """As `cut`, of a tensor whose samples are spread over several axes."""
    axes = next((k for k in range(len(shape), -1, -1) if prod(shape[k:]) > place.stride), 0) + 1
    below = prod(shape[axes:])
    if dim >= axes or place.stride % below:
        return None
    ids = torch.arange(prod(shape[:axes])).div(place.stride // below, rounding_mode="floor") % place.count
    part = ids.view(shape[:axes]).narrow(dim, start, length).flatten().tolist()
    inner = next((number for number, each in enumerate(part) if each != part[0]), len(part))
    count = len(set(part))
    if part != [part[0] + number // inner % count for number in range(len(part))]:
        return None
    first = place.first + part[0]
    return whole(first, (len(part), below)) if count == 1 else Place(inner * below, first, count)


def _joined(given: Sequence[Place | _Slab], shape: Shape, batch: int) -> Place | None:
    """Whose a tensor is, of which that is known from those who use it or parts of it; None where they disagree."""
    places = list(dict.fromkeys(each for each in given if isinstance(each, Place)))
    slabs = list(dict.fromkeys(each for each in given if isinstance(each, _Slab)))
    for place in places or [guess for slab in slabs[:1] for guess in _of_slab(slab, shape)]:
        fits = place.first >= 0 and place.first + place.count <= batch
        if fits and all(other == place for other in places) and all(slab.agrees(place, shape) for slab in slabs):
            return place
    return None


def _of_slab(slab: _Slab, shape: Shape) -> Iterator[Place]:
    """Whose a tensor may be, given one part of it."""
    part, place = slab.shape(shape), slab.place
    at = place.lying(part)
    if place.count == 1:
        yield whole(place.first, shape)
        at = Lying(slab.dim, slab.length)  # as it may be cut sample by sample
    if at is None:
        return
    stride = stride_of(at, shape)
    if at.axis != slab.dim:
        yield Place(stride, place.first, place.count)
    elif slab.length == place.count * at.inner and not slab.start % at.inner and not shape[slab.dim] % at.inner:
        yield Place(stride, place.first - slab.start // at.inner, shape[slab.dim] // at.inner)
        yield Place(stride, place.first, place.count)  # one round of several
    else:
        yield Place(stride, place.first, place.count)


@dataclass
class Places:
    """What is proven of the edges of a graph: outputs of nodes."""

    known: dict[Edge, Place] = field(default_factory=dict)
    """Whose they are."""
    mixed: dict[Edge, str] = field(default_factory=dict)
    """Where the proof ends, and why: the kind of the operation, or `SEVERAL`, where several samples depend on it."""


def places(graph: Graph, starts: Mapping[Edge, Place], batch: int) -> Places:
    """Returns whose each edge is that the given ones depend on, as far as it is proven.

    Arguments:
        graph: that the edges of `starts` are in.
        starts: whose the outputs are, which the search starts at.
        batch: number of samples B.
    """
    given: dict[Edge, list[Place | _Slab | None]] = {edge: [place] for edge, place in starts.items()}
    found = Places()
    for node in reversed(graph.order):
        count = 1 if hasattr(node, "variable") else len(node._input_metadata)
        for edge in [(node, output) for output in range(count) if (node, output) in given]:
            shape, sure = edge_shape(edge), [each for each in given[edge] if each is not None]
            place = _joined(sure, shape, batch) if len(sure) == len(given[edge]) else None
            if place is not None:
                found.known[edge] = place
            elif len(sure) == len(given[edge]):
                found.mixed[edge] = SEVERAL
            for slot, (source, output) in enumerate(node.next_functions):
                if source is not None and _gradient_to(node, edge[1], slot):
                    before = None
                    if place is not None:
                        before = _before(node, edge[1], slot, place, shape, edge_shape((source, output)))
                        if before is None:
                            found.mixed[source, output] = node.name()
                    given.setdefault((source, output), []).append(before)
    return found


def _gradient_to(node: Node, output: int, slot: int) -> bool:
    """Whether the gradient at an output has a part in that of an input; True unless known."""
    return output == slot if _passed_on(node) else True


def _passed_on(node: Node) -> bool:
    """Whether output k is input k as it is, and other inputs get no gradient of it."""
    return getattr(node, "_forward_cls", None) in (Tap, BackwardHookFunction)


def _split(node: Node, output: int, shape: Shape, entering: Shape) -> tuple[int, int, int]:
    dim = _dim(node, len(entering))
    sizes = getattr(node, "_saved_split_sizes", None)
    start = output * node._saved_split_size if sizes is None else sum(sizes[:output])
    return dim, start, shape[dim]


def _slice(node: Node, output: int, shape: Shape, entering: Shape) -> tuple[int, int, int] | None:
    dim = _dim(node, len(entering))
    start, size = _signed(node._saved_start), entering[dim]
    start = min(max(start + size if start < 0 else start, 0), size)
    return (dim, start, shape[dim]) if node._saved_step == 1 else None


def _select(node: Node, output: int, shape: Shape, entering: Shape) -> tuple[int, int, int]:
    dim = _dim(node, len(entering))
    return dim, _signed(node._saved_index) % entering[dim], 1


def _unbind(node: Node, output: int, shape: Shape, entering: Shape) -> tuple[int, int, int]:
    return _dim(node, len(entering)), output, 1


_CUTS = {
    "SplitBackward0": _split,
    "SplitWithSizesBackward0": _split,
    "UnsafeSplitBackward0": _split,
    "UnsafeSplitWithSizesBackward0": _split,
    "SliceBackward0": _slice,
    "SelectBackward0": _select,
    "UnbindBackward0": _unbind,
}


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value  # autograd keeps C++ integers


def _dim(node: Node, axes: int) -> int:
    return _signed(node._saved_dim) % max(axes, 1)


def _before(node: Node, output: int, slot: int, place: Place, shape: Shape, entering: Shape) -> Place | _Slab | None:
    """Whose an input is, by one output of a node: of all of it, or of the part that the output is."""
    kind = node.name()
    if kind in _CUTS:
        part = _CUTS[kind](node, output, shape, entering)
        if part is not None:
            return _Slab(*part, place)
    if kind == "CatBackward0":
        return _of_cat(node, slot, place, shape, entering)
    if kind == "StackBackward0":
        return cut(place, shape, _dim(node, len(shape)), slot, 1)
    if place.count == 1:
        return whole(place.first, entering)
    if _passed_on(node):
        return place
    at = place.lying(shape)
    if at is None:
        return None
    function = _keeping_rows if kind in _NORMS else PASSAGES.get(kind)
    if function is not None:
        before = function(Step(node, slot, at, shape, entering, output))
        return None if before is None else Place(stride_of(before, entering), place.first, place.count)
    # what merely rearranges, and is no passage of its own, is a view of the same entries in the same order
    return place if kind in REARRANGING and prod(shape) == prod(entering) else None


_NORMS = frozenset(f"{name}BatchNormBackward0" for name in ("Native", "Cudnn", "Miopen"))


def _keeping_rows(step: Step) -> Lying | None:
    return step.kept() if step.slot == 0 and step.at.axis in (0, 1) else None


def _of_cat(node: Node, slot: int, place: Place, shape: Shape, entering: Shape) -> Place | None:
    if len(entering) != len(shape):  # an empty tensor, which may have other axes
        return None
    dim = _dim(node, len(shape))
    sizes = [None if source is None else edge_shape((source, k)) for source, k in node.next_functions]
    before = sizes[:slot]
    if None not in before:
        start = sum(size[dim] for size in before if size is not None and len(size) == len(shape))
    elif None not in sizes[slot:]:  # a tensor that needs no gradient has a size that the node does not tell
        start = shape[dim] - sum(size[dim] for size in sizes[slot:] if size is not None and len(size) == len(shape))
    else:
        at = place.lying(shape)
        if at is not None and at.axis == dim and place.count > 1:
            return None
        start = 0
    return cut(place, shape, dim, start, entering[dim])
