"""Separation: whose rows are whose at chosen nodes of the graph, and z there.

    z kept:      z of all nodes, compared with the gradients of weighted losses (`probing`)
    z not kept:  fingerprints of z (`fingerprints`) ─▶ of nodes they leave open, z of a few at a time

z of all nodes is as much again as the graph itself holds. Where it is not asked for, what is left of it is its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from persample.attribution.coupling import row_owner
from persample.attribution.fingerprints import candidates, recognise
from persample.attribution.owner import Output, Owner
from persample.attribution.probing import Visit, attribute
from persample.attribution.proof.proven import Proof
from persample.attribution.stand_ins import stand_ins
from persample.attribution.support import supported
from persample.graph.backward import ends, outputs_of, watched
from persample.graph.nodes import Graph, Node, edge_dtype, edge_shape
from persample.graph.recomputed import forgetting, recomputed_in

T = TypeVar("T")
PARTS = 8
"""Where z is compared and not kept, one in so many of these is held at a time: the more, the more passes."""
SMALLEST = 2**20
"""Bytes of z that are never worth another pass."""


@dataclass
class Separation:
    """What is known of nodes so far: z, what is left of it, and owner of each output; no owner where samples mix."""

    keep: bool = True
    """Whether z is kept."""
    zs: dict[Node, tuple[Tensor | None, ...]] = field(default_factory=dict)
    outputs: dict[Node, tuple[Output | None, ...]] = field(default_factory=dict)
    """None for outputs without a gradient."""
    owners: dict[Node, tuple[Owner | None, ...]] = field(default_factory=dict)
    room: int = 0
    """Bytes of z to be held at a time where they are not kept."""
    proof: Proof | None = None
    """What the graph alone tells; asked where numbers do not."""
    settled: set[Node] = field(default_factory=set)
    """Nodes whose owners are beyond doubt, see `settle`."""

    def separated(self, node: Node) -> bool:
        """True where one sample stands behind every entry of every output."""
        return all(
            z is None or owner is not None
            for z, owner in zip(self.outputs[node], self.owners[node], strict=True)
        )  # fmt: skip

    def read_rows(self, node: Node, batch: int) -> bool:
        """Gives the node's outputs the row reading; returns whether they have one."""
        pairs = zip(self.outputs[node], self.owners[node], strict=True)
        self.owners[node] = tuple(o if z is None or o is not None else row_owner(z, batch) for z, o in pairs)
        return self.separated(node)


Look = Callable[[Node, tuple[Tensor | None, ...], tuple[Owner | None, ...]], object]
"""Gets a node, z and owner of each output, before z is dropped."""


def separate(
    graph: Graph,
    losses: Tensor,
    nodes: Iterable[Node],
    known: Separation,
    *,
    scale: float = 1.0,
    look: Look | None = None,
    looked_at: Collection[Node] = (),
) -> None:
    """Finds owners at the outputs of `nodes`, where z is kept that as well, and adds them to `known`.

    Each comparison takes 1 + ⌈log_`LEVELS` B⌉ passes to these outputs.

    Args:
        graph: of the losses.
        losses: [B]; they count times `scale`.
        nodes: to separate; those that are known are left out.
        known: gets what is found.
        scale: a power of two.
        look: is called at the nodes `looked_at`.
        looked_at: nodes whose z is needed in any case.
    """
    new = [node for node in nodes if node not in known.owners]
    if not any(graph.outputs(node) for node in new):
        return
    if known.keep:
        groups: Iterable[list[Node]] = [new]
    else:
        _recognise(graph, losses, new, known, scale)
        groups = _groups(graph, [node for node in new if node in looked_at or not known.separated(node)], known)
    for group in groups:
        _compare(graph, losses, group, known, scale, look, looked_at)


def believe(graph: Graph, nodes: Iterable[Node], known: Separation) -> None:
    """Takes owners that the graph alone proves, without a pass; z is not looked at."""
    for node in nodes:
        if node not in known.owners and known.proof is not None and known.proof.covers(node):
            used = graph.outputs(node)
            shown = [output if output in used else None for output in range(outputs_of(node))]
            known.owners[node] = known.proof.owners(node)
            known.outputs[node] = tuple(None if k is None else _output_at(node, k) for k in shown)


def _output_at(node: Node, output: int) -> Output:
    edge = node, output
    return Output(edge_shape(edge), edge_dtype(edge), node._input_metadata[output].device)


def settle(graph: Graph, losses: Tensor, nodes: Iterable[Node], known: Separation) -> None:
    """Finds owners once more, by `persample.attribution.support`: where they were not found, or where rounding could
    deceive.

    It takes 2 ⌈log₂ B⌉ passes to the outputs of these nodes, at which z has been looked at before.
    """
    new = [node for node in nodes if node not in known.settled]
    known.settled.update(new)
    for group in [new] if known.keep else _groups(graph, new, known):
        places = Places(graph, losses, group, 1.0)
        outputs = [known.outputs[node][output] for node, output in places.edges]
        if not any(outputs):
            continue
        before = [known.owners[node][output] for node, output in places.edges]
        owners = supported(places.watch, losses, outputs, partial(stand_ins, graph.order), before)
        known.owners.update(places.by_node(owners))


def z_at(graph: Graph, losses: Tensor, nodes: Iterable[Node]) -> dict[Node, tuple[Tensor | None, ...]]:
    """z at the outputs of nodes, from one backward pass after which the graph is still there."""
    nodes = list(nodes)
    edges = [(node, output) for node in nodes for output in graph.outputs(node)]
    if not edges:
        return {}
    wanted = [GradientEdge(*edge) for edge in edges]
    with forgetting(recomputed_in(graph.order, nodes)):
        found = torch.autograd.grad(losses, wanted, torch.ones_like(losses), retain_graph=True, allow_unused=True)
    zs = dict(zip(edges, found, strict=True))
    return {node: tuple(zs.get((node, output)) for output in range(outputs_of(node))) for node in nodes}


def _groups(graph: Graph, nodes: Collection[Node], known: Separation) -> Iterator[list[Node]]:
    """The nodes in the order of the graph, in groups whose z fit into the room, which grows with what is asked for."""
    sizes = {
        node: sum(prod(edge_shape((node, k))) * edge_dtype((node, k)).itemsize for k in graph.outputs(node))
        for node in sorted(nodes, key=graph.order.__getitem__)
    }
    known.room = max(known.room, SMALLEST, sum(sizes.values()) // PARTS)
    group: list[Node] = []
    held = 0
    for node, size in sizes.items():
        if group and held + size > known.room:
            yield group
            group, held = [], 0
        group.append(node)
        held += size
    if group:
        yield group


class Places:
    """The outputs of nodes that something consumes, by number, and passes to them."""

    def __init__(self, graph: Graph, losses: Tensor, nodes: list[Node], scale: float) -> None:
        self._losses, self._nodes, self._scale = losses, nodes, scale
        self.edges = [(node, output) for node in nodes for output in graph.outputs(node)]
        self._numbers = {edge: number for number, edge in enumerate(self.edges)}
        self._last, self._again = ends(graph, nodes), recomputed_in(graph.order, nodes)

    def backward(self, weights: Tensor) -> tuple[Tensor, ...]:
        """The gradients there, all at once."""
        if not self.edges:
            return ()
        edges = [GradientEdge(*edge) for edge in self.edges]
        weights = self._scale * weights
        with forgetting(self._again):
            return torch.autograd.grad(self._losses, edges, weights, retain_graph=True, allow_unused=True)

    def watch(self, weights: Tensor, visit: Visit) -> None:
        """Shows the gradients one after another."""

        def show(node: Node, zs: tuple[Tensor | None, ...]) -> None:
            for output, z in enumerate(zs):
                if z is not None and (node, output) in self._numbers:
                    visit(self._numbers[node, output], z)

        weights = self._scale * weights
        last, again = self._last, self._again
        watched(self._losses, weights, self._nodes, last, show, retain_graph=True, again=again)

    def by_node(self, found: Sequence[T | None]) -> dict[Node, tuple[T | None, ...]]:
        """What was found at each place, by node and output."""
        of_edge = dict(zip(self.edges, found, strict=True))
        return {node: tuple(of_edge.get((node, k)) for k in range(outputs_of(node))) for node in self._nodes}


def _recognise(graph: Graph, losses: Tensor, nodes: list[Node], known: Separation, scale: float) -> None:
    """By the first axis that may count samples, nearly always the one; where it does not, by the others."""
    batch = losses.shape[0]

    def has_others(node: Node) -> bool:
        pairs = zip(known.outputs[node], known.owners[node], strict=True)
        return any(z is not None and o is None and len(candidates(z.shape, batch)) > 1 for z, o in pairs)

    for part in (slice(0, 1), slice(1, None)):
        nodes = [node for node in nodes if node not in known.owners or has_others(node)]
        places = Places(graph, losses, nodes, scale)
        outputs, owners = recognise(places.watch, losses, len(places.edges), part) if nodes else ([], [])
        known.outputs.update(places.by_node(outputs))
        for node, found in places.by_node(owners).items():
            before = known.owners.get(node, found)
            known.owners[node] = tuple(o if o is not None else f for o, f in zip(before, found, strict=True))


def _proven(proof: Proof, edges: Sequence[tuple[Node, int]], place: int) -> Owner | None:
    return proof.owner(*edges[place])


def _compare(
    graph: Graph,
    losses: Tensor,
    nodes: list[Node],
    known: Separation,
    scale: float,
    look: Look | None,
    looked_at: Collection[Node],
) -> None:
    places = Places(graph, losses, nodes, scale)
    given = None if known.proof is None else partial(_proven, known.proof, places.edges)
    found = attribute(places.backward, losses, watch=places.watch, given=given, finite=partial(stand_ins, graph.order))
    zs, owners = places.by_node(found[0]), places.by_node(found[1])
    known.owners.update(owners)
    known.outputs.update({node: tuple(z if z is None else Output.of(z) for z in zs[node]) for node in nodes})
    if known.keep:
        known.zs.update(zs)
    for node in nodes:
        if look is not None and node in looked_at:
            look(node, zs[node], owners[node])
