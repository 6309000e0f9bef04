"""A backward pass that shows the gradients at chosen nodes as they arrive, and frees what it has passed.

z comes from hooks on nodes that the pass runs through anyway. Only nodes with no other chosen one upstream are asked
for by edge: there the pass ends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from persample.graph.nodes import Graph, Node
from persample.graph.recomputed import forgetting

Show = Callable[[Node, tuple[Tensor | None, ...]], None]
"""Gets a node and the gradients of its outputs, None where there is none."""


def ends(graph: Graph, nodes: Collection[Node]) -> list[Node]:
    """Those of the nodes that depend on none of the others."""
    chosen, below = dict.fromkeys(nodes), set[Node]()
    for node in graph.order:  # sources come first
        if any(source in below or source in chosen for source, _ in node.next_functions):
            below.add(node)
    return [node for node in chosen if node not in below]


def watched(
    graph: Graph,
    losses: Tensor,
    weights: Tensor,
    nodes: Collection[Node],
    last: Sequence[Node],
    show: Show,
    *,
    retain_graph: bool,
    again: Sequence[Node] = (),
) -> None:
    """Back-propagates Σ_b w_b ℓ_b.

    Args:
        graph: of the losses.
        losses: ℓ [B].
        weights: w [B].
        nodes: where gradients are shown.
        last: the `ends` of the nodes.
        show: gets the gradients.
        retain_graph: whether the graph is still there afterwards.
        again: nodes of which a checkpoint computes saved tensors again (`persample.graph.recomputed`).
    """
    edges = [(node, output) for node in last for output in graph.outputs(node)]
    if not edges:
        return
    with forgetting(again if retain_graph else ()):
        handles = [node.register_prehook(partial(show, node)) for node in nodes if node not in last]
        wanted = [GradientEdge(*edge) for edge in edges]
        try:
            zs: Sequence[Tensor | None] = torch.autograd.grad(
                losses, wanted, weights, retain_graph=retain_graph, allow_unused=True
            )
        finally:
            for handle in handles:
                handle.remove()
        of_edge = dict(zip(edges, zs, strict=True))
        del zs
        for node in last:
            show(node, tuple(of_edge.pop((node, output), None) for output in range(outputs_of(node))))


def outputs_of(node: Node) -> int:
    """How many outputs the operation of a node has; a leaf has one."""
    return 1 if hasattr(node, "variable") else len(node._input_metadata)
