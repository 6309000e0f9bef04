"""Uses: where each parameter meets the data, and whose rows are whose there.

Data flow, from the graph of the losses:

    candidates: first node behind each parameter ─▶ z and probed z at all of them at once ─▶ uses
                     ▲                                            │
                     └─────── samples mix: go on to consumers ◀───┘

A node at whose output samples mix is one that has not met the data yet (a position table, a weight norm), or
one below an operation that couples samples (batch normalisation in training mode). `persample.graph.provenance` tells
which: from the first kind the search goes on to the consumers, the second kind is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from persample.attribution.coupling import coupled_error, not_finite_error
from persample.attribution.owner import Owner
from persample.attribution.proof.proven import Proof
from persample.attribution.separation import Separation, believe, separate, settle, z_at
from persample.attribution.silent import claim
from persample.attribution.trust import (
    Meeting,
    came_in_unseen,
    in_doubt,
    mixes_inside,
    normalises_over_samples,
    written_in_python,
)
from persample.graph.nodes import Graph, Node
from persample.graph.provenance import Provenance
from persample.graph.routes import SKIPPED, Route, route

SINGLE_STEPS = 3
"""Levels that the search climbs one by one before it looks at everything behind an unseparated node."""


@dataclass(frozen=True)
class Use:
    """Where one parameter meets the data, and the route it takes to there."""

    node: Node
    slot: int
    route: Route


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
    *,
    keep: bool = True,
    last: Collection[Node] = (),
) -> tuple[dict[str, list[Use]], Separation]:
    """Returns every place where each parameter meets the data, and owners there; with `keep` z as well.

    A parameter that losses mix at, at one of the `last` nodes, has no uses: its rows are had from passes to itself.
    """
    batch = losses.shape[0]
    known = Separation(keep, proof=Proof(graph, batch))
    regions: dict[str, set[Node]] = {name: set() for name in parameters}
    leaves = {name: graph.leaves[id(p)] for name, p in parameters.items() if id(p) in graph.leaves}
    refuses = provenance is not None and coupled == "error" and batch > 1
    mixing: set[Node] = set()
    mixed: set[str] = set()

    def look(node: Node, zs: tuple[Tensor | None, ...], owners: tuple[Owner | None, ...]) -> None:
        apart = all(z is None or owner is not None for z, owner in zip(zs, owners, strict=True))
        if provenance is not None and apart and mixes_inside(node, zs, owners, provenance, batch):
            mixing.add(node)

    def coupled_at(node: Node, name: str) -> Exception:
        assert provenance is not None, "without it samples are not told from parameters"
        separate(graph, losses, behind(graph, [node]), known)
        return coupled_error(node, graph, known.separated, provenance, name, coupled, batch)

    waiting = {name: first_nodes(graph, leaf, regions[name]) for name, leaf in leaves.items()}
    reached: dict[str, list[Meeting]] = {name: [] for name in parameters}
    step = 0
    while any(waiting.values()):
        nodes = {meeting[0] for meetings in waiting.values() for meeting in meetings}
        asked = nodes if step <= SINGLE_STEPS else behind(graph, nodes)
        in_python = {node for node in nodes if refuses and written_in_python(node)}
        if provenance is None:
            believe(graph, asked, known)
        separate(graph, losses, asked, known, look=look, looked_at=in_python)
        settle(graph, losses, [node for node in nodes if in_doubt(node, graph, known, provenance, batch)], known)
        for name, meetings in waiting.items():
            waiting[name] = []
            for meeting in meetings:
                node = meeting[0]
                if provenance is not None and coupled == "error" and normalises_over_samples(node, known, provenance):
                    raise coupled_at(node, name)
                if known.separated(node):
                    if refuses and provenance is not None:
                        region = regions[name]
                        if came_in_unseen(meeting, graph, region, known, provenance, batch) or node in mixing:
                            raise coupled_at(node, name)
                    reached[name].append(meeting)
                elif provenance is not None and provenance.saw_data(node, batch):
                    if coupled == "error" or not known.read_rows(node, batch):
                        zs = known.zs[node] if keep else z_at(graph, losses, [node])[node]
                        if not all(z is None or bool(z.isfinite().all()) for z in zs):
                            raise not_finite_error(repr(name))
                        raise coupled_at(node, name)
                    reached[name].append(meeting)
                elif node in last:
                    mixed.add(name)
                elif node not in regions[name]:
                    regions[name].add(node)
                    waiting[name] += first_nodes(graph, node, regions[name])
        for name in mixed:
            waiting[name], reached[name] = [], []
        step += 1
    if keep:
        lacking = dict.fromkeys(m[0] for meetings in reached.values() for m in meetings if m[0] not in known.zs)
        known.zs.update(z_at(graph, losses, lacking))
    slots: dict[Node, dict[int, str]] = {}
    for name, meetings in reached.items():
        for node, slot, _, _ in meetings:
            slots.setdefault(node, {})[slot] = name
    for node in claim(graph, losses, slots, known) if coupled == "error" else ():
        raise not_finite_error(repr(next(iter(slots[node].values()))))
    uses: dict[str, list[Use]] = {name: [] for name in parameters}
    for name, meetings in reached.items():
        for node, slot, source, output in dict.fromkeys(meetings):
            if any(z is not None for z in (known.zs[node] if keep else known.outputs[node])):
                path = route(graph, leaves[name], (source, output), regions[name])
                uses[name].append(Use(node, slot, replace(path, watched=provenance is not None)))
    return uses, known


def behind(graph: Graph, nodes: Iterable[Node]) -> set[Node]:
    """The nodes and everything that depends on them."""
    found, stack = set(), list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(consumer for consumer, _, _ in graph.consumers.get(node, ()))
    return found
