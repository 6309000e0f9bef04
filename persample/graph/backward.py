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

from persample.graph.nodes import Edge, Graph, Node
from persample.graph.recomputed import forgetting

Show = Callable[[Node, tuple[Tensor | None, ...]], None]
"""Gets a node and the gradients of its outputs, None where there is none."""


def ends(graph: Graph, nodes: Collection[Node]) -> list[Edge]:
    """The outputs of those of the nodes that depend on none of the others: where a pass for all of them ends."""
    chosen, below = dict.fromkeys(nodes), set[Node]()
    for node in graph.order:  # sources come first
        if any(source in below or source in chosen for source, _ in node.next_functions):
            below.add(node)
    return [(node, output) for node in chosen if node not in below for output in graph.outputs(node)]


def watched(
    losses: Tensor,
    weights: Tensor,
    nodes: Collection[Node],
    last: Sequence[Edge],
    show: Show,
    *,
    retain_graph: bool,
    again: Sequence[Node] = (),
) -> None:
    """Back-propagates Σ_b w_b ℓ_b.

    Args:
        losses: ℓ [B].
        weights: w [B].
        nodes: where gradients are shown.
        last: the `ends` of the nodes.
        show: gets the gradients.
        retain_graph: whether the graph is still there afterwards.
        again: nodes of which a checkpoint computes saved tensors again (`persample.graph.recomputed`).
    """
    if not last:
        return
    of_last: dict[Node, list[Tensor | None]] = {node: [None] * outputs_of(node) for node, _ in last}
    with forgetting(again if retain_graph else ()):
        handles = [node.register_prehook(partial(show, node)) for node in nodes if node not in of_last]
        wanted = [GradientEdge(*edge) for edge in last]
        try:
            zs: Sequence[Tensor | None] = torch.autograd.grad(
                losses, wanted, weights, retain_graph=retain_graph, allow_unused=True
            )
        finally:
            for handle in handles:
                handle.remove()
        for (node, output), z in zip(last, zs, strict=True):
            of_last[node][output] = z
        del zs, z
        while of_last:
            node = next(iter(of_last))
            show(node, tuple(of_last.pop(node)))


def outputs_of(node: Node) -> int:
    """How many outputs the operation of a node has; a leaf has one."""
    return 1 if hasattr(node, "variable") else len(node._input_metadata)
