"""Uses: where each parameter meets the data, and whose rows are whose there.

Data flow, from the graph of the losses:

    candidates: first node behind each parameter ─▶ z and probed z at all of them at once ─▶ uses
                     ▲                                            │
                     └─────── samples mix: go on to consumers ◀───┘

A node at whose output samples mix is one that has not met the data yet (a position table, a weight norm), or
one below an operation that couples samples (batch normalisation in training mode). `persample.provenance` tells
which: from the first kind the search goes on to the consumers, the second kind is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import floor, log2, prod

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from persample.attribution import DEFAULT_LEVELS, Owner, Visit, attribute
from persample.coupling import coupled_error, row_owner, underflow_error
from persample.graph import SKIPPED, Graph, Node, Route, call_node, edge_shape, route
from persample.passes import ends, outputs_of, watched
from persample.provenance import Provenance

SINGLE_STEPS = 3
"""Levels that the search climbs one by one before it looks at everything behind an unseparated node."""


@dataclass
class Separation:
    """What is known of nodes so far: z and owner of each output; an owner of None marks mixed samples."""

    zs: dict[Node, tuple[Tensor | None, ...]] = field(default_factory=dict)
    owners: dict[Node, tuple[Owner | None, ...]] = field(default_factory=dict)

    def separated(self, node: Node) -> bool:
        """True where one sample stands behind every entry of every output."""
        return all(
            z is None or owner is not None
            for z, owner in zip(self.zs[node], self.owners[node], strict=True)
        )  # fmt: skip

    def read_rows(self, node: Node, batch: int) -> bool:
        """Gives the node's outputs the row reading; returns whether they have one."""
        pairs = zip(self.zs[node], self.owners[node], strict=True)
        self.owners[node] = tuple(o if z is None or o is not None else row_owner(z, batch) for z, o in pairs)
        return self.separated(node)


Meeting = tuple[Node, int, Node, int]
"""A node, the slot through which a parameter enters, and the edge (source, output) that feeds it."""


@dataclass(frozen=True)
class Use:
    """Where one parameter meets the data, and the route it takes to there."""

    node: Node
    slot: int
    route: Route


def separate(graph: Graph, losses: Tensor, nodes: Iterable[Node], known: Separation, scale: float = 1.0) -> None:
    """Finds z and owners at the outputs of `nodes` and adds them to `known`; of the losses times `scale`."""
    new = [node for node in nodes if node not in known.zs]
    edges_of = [(node, output) for node in new for output in graph.outputs(node)]
    if not edges_of:
        return
    edges = [GradientEdge(*edge) for edge in edges_of]

    def backward(weights: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(losses, edges, scale * weights, retain_graph=True, allow_unused=True)

    places = {edge: place for place, edge in enumerate(edges_of)}
    last = ends(graph, new)

    def watch(weights: Tensor, visit: Visit) -> None:
        def show(node: Node, zs: tuple[Tensor | None, ...]) -> None:
            for output, z in enumerate(zs):
                if z is not None and (node, output) in places:
                    visit(places[node, output], z)

        watched(graph, losses, scale * weights, new, last, show, retain_graph=True)

    z, owner = attribute(backward, losses, watch=watch)
    found = dict(zip(edges_of, zip(z, owner, strict=True), strict=True))
    for node in new:
        pairs = [found.get((node, output), (None, None)) for output in range(outputs_of(node))]
        known.zs[node] = tuple(z for z, _ in pairs)
        known.owners[node] = tuple(owner for _, owner in pairs)


def first_nodes(graph: Graph, node: Node, region: set[Node]) -> list[Meeting]:
    """Where the output of `node` is used next; operations that merely rearrange are passed, into `region`."""
    found = []
    for consumer, slot, output in graph.consumers.get(node, ()):
        if consumer.name() in SKIPPED and consumer is not graph.root:
            if consumer not in region:
                region.add(consumer)
                found += first_nodes(graph, consumer, region)
        else:
            found.append((consumer, slot, node, output))
    return found


def find_uses(
    graph: Graph,
    losses: Tensor,
    parameters: Mapping[str, Tensor],
    coupled: str,
    provenance: Provenance | None,
) -> tuple[dict[str, list[Use]], Separation]:
    """Returns every place where each parameter meets the data, and z with owners there."""
    batch = losses.shape[0]
    known = Separation()
    regions: dict[str, set[Node]] = {name: set() for name in parameters}
    leaves = {name: graph.leaves[id(p)] for name, p in parameters.items() if id(p) in graph.leaves}

    def coupled_at(node: Node, name: str) -> Exception:
        assert provenance is not None, "without it samples are not told from parameters"
        half = [z.dtype for z in known.zs[node] if z is not None and z.dtype in (torch.float16, torch.bfloat16)]
        return coupled_error(node, graph, known.separated, provenance, name, coupled, batch, next(iter(half), None))

    waiting = {name: first_nodes(graph, leaf, regions[name]) for name, leaf in leaves.items()}
    reached: dict[str, list[Meeting]] = {name: [] for name in parameters}
    step = 0
    while any(waiting.values()):
        nodes = {meeting[0] for meetings in waiting.values() for meeting in meetings}
        separate(graph, losses, nodes if step <= SINGLE_STEPS else behind(graph, nodes), known)
        for name, meetings in waiting.items():
            waiting[name] = []
            for meeting in meetings:
                node = meeting[0]
                if provenance is not None and coupled == "error" and normalises_over_samples(node, known):
                    separate(graph, losses, behind(graph, [node]), known)
                    raise coupled_at(node, name)
                if known.separated(node) and trusted(node, graph, known, provenance, batch):
                    if (
                        provenance is not None
                        and coupled == "error"
                        and batch > 1
                        and (
                            came_in_unseen(meeting, graph, regions[name], known, provenance, batch)
                            or mixes_inside(node, known, provenance, batch)
                        )
                    ):
                        raise coupled_at(node, name)
                    reached[name].append(meeting)
                elif provenance is not None and provenance.saw_data(node, batch):
                    if coupled == "error" or not known.read_rows(node, batch):
                        if underflows(graph, losses, node, known):
                            raise underflow_error(name, known.zs[node])
                        separate(graph, losses, behind(graph, [node]), known)
                        raise coupled_at(node, name)
                    reached[name].append(meeting)
                elif node not in regions[name]:
                    regions[name].add(node)
                    waiting[name] += first_nodes(graph, node, regions[name])
        step += 1
    uses: dict[str, list[Use]] = {name: [] for name in parameters}
    for name, meetings in reached.items():
        for node, slot, source, output in dict.fromkeys(meetings):
            if any(z is not None for z in known.zs[node]):
                uses[name].append(Use(node, slot, route(graph, leaves[name], (source, output), regions[name])))
    return uses, known


def underflows(graph: Graph, losses: Tensor, node: Node, known: Separation) -> bool:
    """Whether samples that mix at a node are apart there when the losses are larger: digits of z are lost."""
    zs = [z for z in known.zs[node] if z is not None]
    present = [z.detach().abs()[z.isfinite() & (z != 0)] for z in zs]
    lowest = min((torch.finfo(z.dtype) for z in zs), key=lambda kind: kind.max)
    largest = max((float(entries.max()) for entries in present if entries.numel()), default=0.0)
    smallest = min((float(entries.min()) for entries in present if entries.numel()), default=1.0)
    if smallest * 2.0**-DEFAULT_LEVELS > lowest.tiny or largest == 0:
        return False
    room = log2(lowest.max / largest) / 2, log2(torch.finfo(losses.dtype).max) / 2
    larger = Separation()
    separate(graph, losses, [node], larger, 2.0 ** floor(min(room)))
    return larger.separated(node)


def trusted(node: Node, graph: Graph, known: Separation, provenance: Provenance | None, batch: int) -> bool:
    """Whether separated samples at a node can be believed.

    An operation on parameters alone sums over samples. Where one sample's part is so large that the others' vanish
    in rounding, the sum looks like that sample's own; a regular pattern over all samples cannot come about so.
    """
    if provenance is None or batch == 1 or node is graph.root or provenance.saw_data(node, batch):
        return True
    return all(owner is None or owner.layout in ("identity", "grouped", "tiled") for owner in known.owners[node])


def came_in_unseen(
    meeting: Meeting, graph: Graph, region: set[Node], known: Separation, provenance: Provenance, batch: int
) -> bool:
    """Whether samples became apart where a parameter met none, on from operations that may have read data.

    What all samples share becomes a sample's own by meeting samples, or by being copied for each of them. Samples that
    come apart in another way were there before, and the operations that were passed mixed them.
    """
    node, _, source, output = meeting
    if node is graph.root or written_in_python(node) or provenance.met_samples(node, batch):
        return False
    entering = prod(edge_shape((source, output)))
    if any(z is not None and z.numel() > entering for z in known.zs[node]):
        return False
    mixed = (passed for passed in region if passed in known.zs and not known.separated(passed))
    return any(provenance.doubtful(passed) for passed in mixed)


def written_in_python(node: Node) -> bool:
    """Whether the node belongs to a custom `torch.autograd.Function`."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def mixes_inside(node: Node, known: Separation, provenance: Provenance, batch: int) -> bool:
    """Whether a custom Function hands the gradient of one sample on to others, as far as its backward tells.

    Its parameters' rows can be told apart, as those of batch normalisation's weight, and depend on other samples.
    """
    if not written_in_python(node):
        return False
    mixed = False
    for output, (z, owner) in enumerate(zip(known.zs[node], known.owners[node], strict=True)):
        if z is None or owner is None or owner.axis is None:
            continue
        [alone] = owner.masked(z, slice(batch - 1, batch))
        with torch.no_grad():
            grads = call_node(node, [alone if k == output else None for k in range(len(known.zs[node]))])
        others = owner.ids != batch - 1
        for grad, (source, _) in zip(grads, node.next_functions, strict=True):
            data = source is None or provenance.saw_data(source, batch)
            if data and isinstance(grad, Tensor) and grad.ndim >= z.ndim > 1 and grad.shape[owner.axis] == len(others):
                mixed = mixed or bool(grad.movedim(owner.axis, 0)[others].any())
    return mixed


def normalises_over_samples(node: Node, known: Separation) -> bool:
    """Whether the node is batch normalisation in training mode, over more than one sample.

    Its own weight and bias have rows that add up, but each of them depends on the other samples. Instance
    normalisation is the same operation with samples among the channels, which are apart.
    """
    owner = known.owners[node][0]
    training = "BatchNorm" in node.name() and getattr(node, "_saved_training", True)
    return training and (owner is None or (owner.axis != 1 and owner.batch > 1))


def behind(graph: Graph, nodes: Iterable[Node]) -> set[Node]:
    """The nodes and everything that depends on them."""
    found, stack = set(), list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(consumer for consumer, _, _ in graph.consumers.get(node, ()))
    return found
