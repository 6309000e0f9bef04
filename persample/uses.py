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
from dataclasses import dataclass
from math import floor, log2

import torch
from torch import Tensor

from persample.attribution import DEFAULT_LEVELS, Owner
from persample.coupling import coupled_error, underflow_error
from persample.graph import SKIPPED, Graph, Node, Route, route
from persample.guards import Meeting, came_in_unseen, mixes_inside, normalises_over_samples, trusted, written_in_python
from persample.provenance import Provenance
from persample.separation import Separation, separate, z_at

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
) -> tuple[dict[str, list[Use]], Separation]:
    """Returns every place where each parameter meets the data, and owners there; with `keep` z as well."""
    batch = losses.shape[0]
    known = Separation(keep)
    regions: dict[str, set[Node]] = {name: set() for name in parameters}
    leaves = {name: graph.leaves[id(p)] for name, p in parameters.items() if id(p) in graph.leaves}
    refuses = provenance is not None and coupled == "error" and batch > 1
    mixing: set[Node] = set()

    def look(node: Node, zs: tuple[Tensor | None, ...], owners: tuple[Owner | None, ...]) -> None:
        apart = all(z is None or owner is not None for z, owner in zip(zs, owners, strict=True))
        if provenance is None or not apart or not trusted(node, graph, owners, provenance, batch):
            return
        if mixes_inside(node, zs, owners, provenance, batch):
            mixing.add(node)

    def coupled_at(node: Node, name: str) -> Exception:
        assert provenance is not None, "without it samples are not told from parameters"
        half = [z.dtype for z in known.outputs[node] if z is not None and z.dtype in (torch.float16, torch.bfloat16)]
        separate(graph, losses, behind(graph, [node]), known)
        return coupled_error(node, graph, known.separated, provenance, name, coupled, batch, next(iter(half), None))

    waiting = {name: first_nodes(graph, leaf, regions[name]) for name, leaf in leaves.items()}
    reached: dict[str, list[Meeting]] = {name: [] for name in parameters}
    step = 0
    while any(waiting.values()):
        nodes = {meeting[0] for meetings in waiting.values() for meeting in meetings}
        asked = nodes if step <= SINGLE_STEPS else behind(graph, nodes)
        in_python = {node for node in nodes if refuses and written_in_python(node)}
        separate(graph, losses, asked, known, look=look, looked_at=in_python)
        for name, meetings in waiting.items():
            waiting[name] = []
            for meeting in meetings:
                node = meeting[0]
                if provenance is not None and coupled == "error" and normalises_over_samples(node, known, provenance):
                    raise coupled_at(node, name)
                if known.separated(node) and trusted(node, graph, known.owners[node], provenance, batch):
                    if refuses and provenance is not None:
                        region = regions[name]
                        if came_in_unseen(meeting, graph, region, known, provenance, batch) or node in mixing:
                            raise coupled_at(node, name)
                    reached[name].append(meeting)
                elif provenance is not None and provenance.saw_data(node, batch):
                    if coupled == "error" or not known.read_rows(node, batch):
                        zs = known.zs[node] if keep else z_at(graph, losses, [node])[node]
                        if underflows(graph, losses, node, zs):
                            raise underflow_error(name, zs)
                        raise coupled_at(node, name)
                    reached[name].append(meeting)
                elif node not in regions[name]:
                    regions[name].add(node)
                    waiting[name] += first_nodes(graph, node, regions[name])
        step += 1
    uses: dict[str, list[Use]] = {name: [] for name in parameters}
    for name, meetings in reached.items():
        for node, slot, source, output in dict.fromkeys(meetings):
            if any(z is not None for z in known.outputs[node]):
                uses[name].append(Use(node, slot, route(graph, leaves[name], (source, output), regions[name])))
    return uses, known


def underflows(graph: Graph, losses: Tensor, node: Node, found: tuple[Tensor | None, ...]) -> bool:
    """Whether samples that mix at a node, of which z is given, are apart there when the losses are larger.

    Then digits of z are lost.
    """
    zs = [z for z in found if z is not None]
    present = [z.detach().abs()[z.isfinite() & (z != 0)] for z in zs]
    lowest = min((torch.finfo(z.dtype) for z in zs), key=lambda kind: kind.max)
    largest = max((float(entries.max()) for entries in present if entries.numel()), default=0.0)
    smallest = min((float(entries.min()) for entries in present if entries.numel()), default=1.0)
    if smallest * 2.0**-DEFAULT_LEVELS > lowest.tiny or largest == 0:
        return False
    room = log2(lowest.max / largest) / 2, log2(torch.finfo(losses.dtype).max) / 2
    larger = Separation()
    separate(graph, losses, [node], larger, scale=2.0 ** floor(min(room)))
    return larger.separated(node)


def behind(graph: Graph, nodes: Iterable[Node]) -> set[Node]:
    """The nodes and everything that depends on them."""
    found, stack = set(), list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(consumer for consumer, _, _ in graph.consumers.get(node, ()))
    return found
