"""Backend `outputs`: the autograd graph itself, so that no operation of the model needs to be known by type.

The per-sample gradient is had from gradients with respect to the *outputs* of the operations that use a
parameter (section IV-C of the FNGD paper); no parameter gradient is computed on the way. Data flow:

    losses ─▶ graph ─▶ candidates: first node behind each parameter ─▶ z and probed z at all of them at once
                            ▲                                                  │
                            └──── samples mix there: go on to its consumers ◀──┤
                                                                               └─▶ sites ─▶ rules ─▶ blocks

A node at whose output samples mix is one that has not met the data yet (a position table, a weight norm), or
one below an operation that couples samples (batch normalisation in training mode). `persample.provenance` tells
which: from the first kind the search goes on to the consumers, the second kind is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from persample.attribution import Owner, backward_pairs, locate
from persample.backends import Capture, Captured, Problem, register
from persample.blocks import Block, Dense, Outer, Pulled
from persample.checks import check_losses, check_sum
from persample.coupling import coupled_error, row_owner
from persample.graph import SKIPPED, Graph, Node, Route, route, trace
from persample.provenance import Provenance
from persample.rules import Site, build

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


def separate(graph: Graph, losses: Tensor, nodes: Iterable[Node], known: Separation) -> None:
    """Finds z and owners at the outputs of `nodes` and adds them to `known`."""
    new = [node for node in nodes if node not in known.zs]
    edges = [GradientEdge(node, output) for node in new for output in graph.outputs(node)]
    if not edges:
        return

    def backward(weights: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(losses, edges, weights, retain_graph=True, allow_unused=True)

    z, probed, levels = backward_pairs(backward, losses)
    position = 0
    for node in new:
        count = len(node._input_metadata) if not hasattr(node, "variable") else 1
        zs: list[Tensor | None] = [None] * count
        owners: list[Owner | None] = [None] * count
        for output in graph.outputs(node):
            found = z[position]
            if found is not None:
                zs[output] = found
                owners[output] = locate(found, [p[position] for p in probed], losses.shape[0], levels)
            position += 1
        known.zs[node], known.owners[node] = tuple(zs), tuple(owners)


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
                if known.separated(node):
                    reached[name].append(meeting)
                elif provenance is not None and provenance.saw_data(node, batch):
                    if coupled == "error" or not known.read_rows(node, batch):
                        separate(graph, losses, behind(graph, [node]), known)
                        raise coupled_error(node, graph, known.separated, provenance.module, name, coupled)
                    reached[name].append(meeting)
                elif node not in regions[name]:
                    regions[name].add(node)
                    waiting[name] += first_nodes(graph, node, regions[name])
        step += 1
    uses: dict[str, list[Use]] = {name: [] for name in parameters}
    for name, meetings in reached.items():
        for node, slot, source, output in dict.fromkeys(meetings):
            if any(z is not None for z in known.zs[node]):
                uses[name].append(
                    Use(node, slot, route(graph, leaves[name], (source, output), regions[name]))
                )
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


def pulled(block: Block, path: Route) -> Block:
    """The block behind the operations between the parameter and its use."""
    if not path.nodes:
        return block
    if path.names in (["TBackward0"], ["TransposeBackward0"]) and isinstance(block, Outer):
        return block.transposed
    shape = tuple(path.leaf.variable.shape)
    if isinstance(block, Dense):
        return Dense(path.pull(block.values))
    return Pulled(block, path.pull, shape, path.isometric)


def merged(uses: list[Captured]) -> tuple[Captured, ...]:
    """Uses with outer products of equal shape joined along time: a recurrent weight, a module called twice."""
    outer = [use for use in uses if isinstance(use.block, Outer)]
    if len(outer) < 2:
        return tuple(uses)
    block = Outer(
        torch.cat([use.block.x for use in outer], dim=1),  # type: ignore[attr-defined]
        torch.cat([use.block.z for use in outer], dim=1),  # type: ignore[attr-defined]
    )
    joined = Captured(block, f"{outer[0].operation} × {len(outer)}", outer[0].rule)
    return joined, *(use for use in uses if not isinstance(use.block, Outer))


def capture_losses(
    losses: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    provenance: Provenance | None = None,
    coupled: str = "error",
    check: bool = True,
) -> Capture:
    """Returns the capture of losses that are already there; their graph is kept.

    Without `provenance` nothing tells data from parameters: rows are ∂ℓ_b/∂θ, other samples held fixed.
    """
    losses = check_losses(losses)
    graph = trace(losses)
    uses, known = find_uses(graph, losses, parameters, coupled, provenance)
    built: dict[tuple[Node, int], tuple[Block, str]] = {}
    captured: dict[str, tuple[Captured, ...]] = {}
    with torch.no_grad():
        for name, places in uses.items():
            found = []
            for use in places:
                key = (use.node, use.slot)
                if key not in built:
                    site = Site(
                        use.node, use.slot, known.zs[use.node], known.owners[use.node], losses.shape[0]
                    )
                    built[key] = build(site)
                block, rule = built[key]
                found.append(
                    Captured(pulled(block, use.route), use.node.name().replace("Backward0", ""), rule)
                )
            captured[name] = merged(found)
    result = Capture(losses.detach(), captured)
    if check and parameters and losses.requires_grad:
        total = torch.autograd.grad(
            losses, list(parameters.values()), torch.ones_like(losses), retain_graph=True, allow_unused=True
        )
        precision = min((p.dtype for p in parameters.values()), key=lambda d: -torch.finfo(d).eps)
        precision = min((precision, losses.dtype), key=lambda d: -torch.finfo(d).eps)
        check_sum(
            result.blocks, dict(zip(parameters, total, strict=True)), precision=precision, backend="outputs"
        )  # fmt: skip
    return result


@register("outputs", covers="every operation: rules for the common ones, the generic node rule for the rest")
def capture(problem: Problem) -> Capture:
    """Runs the model and captures its losses."""
    provenance = Provenance()
    provenance.follow(problem.inputs)
    with torch.enable_grad():
        with provenance.named(problem.model), provenance:
            losses = problem.loss_fn(problem.outputs(), problem.targets)
        return capture_losses(
            losses, problem.parameters, provenance=provenance, coupled=problem.coupled, check=problem.check
        )  # fmt: skip
