"""Which samples lie where in what came before a tensor, proven from the kinds of operations, and from indices.

As far as kinds tell, it is a pattern, the same for every batch with such a graph:

    entry i, counted in row-major order, belongs to sample  first + (i // stride) mod count

    losses [B]                                                                first 0, count B, stride 1
    layer(x[2:4])                   rows 0 1 are samples 2 3                  first 2, count 2
    layer(x[2]), [T, D]             all of it is sample 2's                   first 2, count 1
    torch.cat([layer(a), layer(b)]), torch.stack, split, chunk, unbind, x[i]  cut and join

What is cut is put together again where the cuts agree; where they do not, and behind operations that are not known,
nothing is proven. Where data place rows (experts, valid tokens, permutations), whose they are is a list, that of this
batch: `persample.attribution.rows` reads it off the indices that the operations have saved.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch.nn.modules._functions import BackwardHookFunction

from persample.attribution.proof.batching_rules import BATCHING_RULES, AxisLayout, BatchingRule, Step, stride_of
from persample.attribution.proof.layouts import Place, Rows, Shape, Slab, cut, cut_rows, joined, viewed, whole
from persample.attribution.proof.routed import routed_before
from persample.graph.nodes import Edge, Graph, Node, edge_shape, saved_dim, signed
from persample.graph.routes import REARRANGING

SEVERAL = "several"


@dataclass
class Places:
    """What is proven of the edges of a graph: outputs of nodes."""

    known: dict[Edge, Place] = field(default_factory=dict)
    """Whose they are, by patterns."""
    listed: dict[Edge, Rows] = field(default_factory=dict)
    """Whose they are in this batch, where data place rows."""
    mixed: dict[Edge, str] = field(default_factory=dict)
    """Where the proof ends, and why: the kind of the operation, or `SEVERAL`, where several samples depend on it."""
    reached: set[Edge] = field(default_factory=set)
    """All edges on the way, proven or not."""


def places(
    graph: Graph,
    starts: Mapping[Edge, Place],
    batch: int,
    *,
    batching_rules: Mapping[str, BatchingRule] = BATCHING_RULES,
    among: Collection[Node] | None = None,
    routed: bool = False,
) -> Places:
    """Returns whose each edge is that the given ones depend on, as far as it is proven.

    Arguments:
        graph: that the edges of `starts` are in.
        starts: whose the outputs are, which the search starts at.
        batch: number of samples B.
        batching_rules: what is known of kinds of operations.
        among: nodes to look at; default: all.
        routed: whether indices are looked at, which hold for this batch alone.
    """
    given: dict[Edge, list[Place | Rows | Slab | None]] = {edge: [place] for edge, place in starts.items()}
    found = Places()
    for node in reversed(graph.order):
        if among is not None and node not in among:
            continue
        count = 1 if hasattr(node, "variable") else len(node._input_metadata)
        for edge in [(node, output) for output in range(count) if (node, output) in given]:
            shape, sure = edge_shape(edge), [each for each in given[edge] if each is not None]
            device = torch.device("cpu") if hasattr(node, "variable") else node._input_metadata[edge[1]].device
            place = joined(sure, shape, batch, device) if len(sure) == len(given[edge]) else None
            found.reached.add(edge)
            if isinstance(place, Rows):
                found.listed[edge] = place
            elif place is not None:
                found.known[edge] = place
            elif len(sure) == len(given[edge]):
                found.mixed[edge] = SEVERAL
            for slot, (source, output) in enumerate(node.next_functions):
                if source is None or (among is not None and source not in among):
                    continue
                if _gradient_to(node, edge[1], slot):
                    to = edge_shape((source, output))
                    before: Place | Rows | Slab | None = None
                    if place is not None:
                        if routed and isinstance(place, Place) and place.count == 1:  # indices tell more
                            before = routed_before(node, slot, place, shape, to, device)
                        before = before or _before(node, edge[1], slot, place, shape, to, batching_rules)
                        if before is None and routed:
                            before = routed_before(node, slot, place, shape, to, device)
                        if before is None:
                            found.mixed[source, output] = node.name()
                    given.setdefault((source, output), []).append(before)
    return found


def _gradient_to(node: Node, output: int, slot: int) -> bool:
    """Whether the gradient at an output has a part in that of an input; True unless known."""
    return output == slot if _passed_on(node) else True


def _passed_on(node: Node) -> bool:
    """Whether output k is input k as it is, and other inputs get no gradient of it."""
    function = getattr(node, "_forward_cls", None)
    return function is BackwardHookFunction or getattr(function, "passes_on", False)


def _split(node: Node, output: int, shape: Shape, entering: Shape) -> tuple[int, int, int]:
    dim = saved_dim(node, len(entering))
    sizes = getattr(node, "_saved_split_sizes", None)
    start = output * node._saved_split_size if sizes is None else sum(sizes[:output])
    return dim, start, shape[dim]


def _slice(node: Node, output: int, shape: Shape, entering: Shape) -> tuple[int, int, int] | None:
    dim = saved_dim(node, len(entering))
    start, size = signed(node._saved_start), entering[dim]
    start = min(max(start + size if start < 0 else start, 0), size)
    return (dim, start, shape[dim]) if node._saved_step == 1 else None


def _select(node: Node, output: int, shape: Shape, entering: Shape) -> tuple[int, int, int]:
    dim = saved_dim(node, len(entering))
    return dim, signed(node._saved_index) % entering[dim], 1


def _unbind(node: Node, output: int, shape: Shape, entering: Shape) -> tuple[int, int, int]:
    return saved_dim(node, len(entering)), output, 1


_CUTS = {
    "SplitBackward0": _split,
    "SplitWithSizesBackward0": _split,
    "UnsafeSplitBackward0": _split,
    "UnsafeSplitWithSizesBackward0": _split,
    "SliceBackward0": _slice,
    "SelectBackward0": _select,
    "UnbindBackward0": _unbind,
}


def _before(
    node: Node,
    output: int,
    slot: int,
    place: Place | Rows,
    shape: Shape,
    entering: Shape,
    batching_rules: Mapping[str, BatchingRule],
) -> Place | Rows | Slab | None:
    """Whose an input is, by one output of a node: of all of it, or of the part that the output is."""
    kind = node.name()
    if kind in _CUTS:
        part = _CUTS[kind](node, output, shape, entering)
        if part is not None:
            return _slab(part, place, shape, entering)
    if kind == "CatBackward0":
        return _of_cat(node, slot, place, shape, entering)
    if kind == "StackBackward0":
        return _part(place, shape, saved_dim(node, len(shape)), slot, 1, entering)
    if _passed_on(node):
        return place
    if isinstance(place, Place):
        return _by_pattern(node, output, slot, place, shape, entering, batching_rules)
    if kind in batching_rules:
        before = batching_rules[kind](Step(node, slot, AxisLayout(place.axis, 1), shape, entering, output))
        fits = before is not None and before.inner == 1 and entering[before.axis] == len(place.ids)
        if not fits or before is None:
            return None
        return place if before.axis == place.axis else Rows(before.axis, place.ids)
    return viewed(place, shape, entering) if _rearranges(kind, shape, entering) else None


def _by_pattern(
    node: Node,
    output: int,
    slot: int,
    place: Place,
    shape: Shape,
    entering: Shape,
    batching_rules: Mapping[str, BatchingRule],
) -> Place | None:
    kind = node.name()
    if place.count == 1:
        return whole(place.first, entering)
    if kind in batching_rules:
        at = place.axis_layout(shape)
        before = None if at is None else batching_rules[kind](Step(node, slot, at, shape, entering, output))
        return None if before is None else Place(stride_of(before, entering), place.first, place.count)
    return place if _rearranges(kind, shape, entering) else None


def _rearranges(kind: str, shape: Shape, entering: Shape) -> bool:
    """Whether it is a view of the same entries in the same order, having no rule of its own."""
    return kind in REARRANGING and prod(shape) == prod(entering)


def _slab(part: tuple[int, int, int], place: Place | Rows, shape: Shape, entering: Shape) -> Slab | None:
    """An output as a part of an input; an axis that it has not is put back."""
    dim, start, length = part
    if isinstance(place, Rows) and len(shape) < len(entering):
        place = Rows(place.axis + (place.axis >= dim), place.ids)
    return Slab(dim, start, length, place)


def _part(place: Place | Rows, shape: Shape, dim: int, start: int, length: int, entering: Shape) -> Place | Rows | None:
    """Whose a part of an output is, that an input is; an axis that the input has not is taken away."""
    if isinstance(place, Place):
        return cut(place, shape, dim, start, length)
    rows = cut_rows(place, dim, start, length)
    if len(entering) == len(shape):
        return rows
    if rows.axis == dim:
        first = int(rows.ids[0])
        return whole(first, entering) if first >= 0 else None
    return Rows(rows.axis - (rows.axis > dim), rows.ids)


def _of_cat(node: Node, slot: int, place: Place | Rows, shape: Shape, entering: Shape) -> Place | Rows | None:
    if len(entering) != len(shape):  # an empty tensor, which may have other axes
        return None
    dim = saved_dim(node, len(shape))
    sizes = [None if source is None else edge_shape((source, k)) for source, k in node.next_functions]
    before = sizes[:slot]
    if None not in before:
        start = sum(size[dim] for size in before if size is not None and len(size) == len(shape))
    elif None not in sizes[slot:]:  # a tensor that needs no gradient has a size that the node does not tell
        start = shape[dim] - sum(size[dim] for size in sizes[slot:] if size is not None and len(size) == len(shape))
    else:
        if _along(place, shape, dim):
            return None
        start = 0
    return _part(place, shape, dim, start, entering[dim], entering)


def _along(place: Place | Rows, shape: Shape, dim: int) -> bool:
    """Whether samples lie along that axis."""
    if isinstance(place, Rows):
        return place.axis == dim
    at = place.axis_layout(shape)
    return at is not None and at.axis == dim and place.count > 1
