"""Whose rows are whose without a backward pass: by patterns that hold for every batch, or by the lists of this one.

`persample.attribution.probing` tells whose row is whose for the batch at hand. The next batch may route rows elsewhere
(mixtures of experts, packed sequences, permutations), so its result is kept only where the kinds of the
operations between a use and the losses leave no choice: each of them must be known to treat samples apart,
whatever the data. Where data place rows, it is asked again for each batch; of the indices, if they tell, or else by one
more backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch

from persample.attribution.owner import Owner
from persample.attribution.proof.batching_rules import AxisLayout
from persample.attribution.proof.layouts import Place, rows_of
from persample.attribution.proof.walk import Places, places
from persample.graph.nodes import Edge, Graph, Node, edge_shape


def proven(graph: Graph, cuts: Iterable[Node], batch: int) -> dict[Edge, AxisLayout] | None:
    """Returns where samples lie at every output of the `cuts`, proven from the kinds of operations alone, or None.

    Args:
        graph: traced from the losses.
        cuts: nodes at which parameters meet the data.
        batch: number of samples B.
    """
    targets = set(cuts)
    found = _from_losses(graph, targets, batch)
    at_cuts: dict[Edge, AxisLayout] = {}
    for edge in found.reached:
        if edge[0] in targets:
            at = _of_all(found.known.get(edge), edge, batch)
            if at is None:
                return None
            at_cuts[edge] = at
    return at_cuts


def _from_losses(graph: Graph, nodes: set[Node], batch: int, *, routed: bool = False) -> Places:
    leads = leading_to(graph, nodes)
    return places(graph, {(graph.root, 0): Place(1, 0, batch)}, batch, among=leads, routed=routed)


def _of_all(place: Place | None, edge: Edge, batch: int) -> AxisLayout | None:
    """Where all samples lie; None where a tensor holds some of them."""
    if place is None or place.first != 0 or place.count != batch:
        return None
    return place.axis_layout(edge_shape(edge))


def leading_to(graph: Graph, targets: set[Node]) -> set[Node]:
    """Nodes on a path from one of the targets to the losses, targets included."""
    found: set[Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(consumer for consumer, _, _ in graph.consumers.get(node, ()))
    return found


class Proof:
    """Whose rows are whose as far as the graph proves it, for the batch that it is of; made when it is first asked.

    Args:
        graph: traced from the losses.
        batch: number of samples B.
        nodes: what will be asked of; default: everything.
    """

    def __init__(self, graph: Graph, batch: int, nodes: Iterable[Node] | None = None) -> None:
        self._graph, self._batch = graph, batch
        self._nodes = set(graph.order if nodes is None else nodes)

    def covers(self, node: Node) -> bool:
        """Whether samples are proven to be apart at every output of a node that something consumes."""
        return all(self.owner(node, output) is not None for output in self._graph.outputs(node))

    def owners(self, node: Node) -> tuple[Owner | None, ...]:
        """The owner of every output of a node; None for those that nothing consumes."""
        used = self._graph.outputs(node)
        return tuple(self.owner(node, k) if k in used else None for k in range(len(node._input_metadata)))

    def owner(self, node: Node, output: int) -> Owner | None:
        """The owner of the gradient at an output, or None where there is no proof."""
        edge = node, output
        place, rows = self._places.known.get(edge), self._places.listed.get(edge)
        if place is not None:
            rows = rows_of(place, edge_shape(edge), node._input_metadata[output].device)
        return None if rows is None else rows.owner(self._batch)

    @cached_property
    def _places(self) -> Places:
        return _from_losses(self._graph, self._nodes, self._batch, routed=True)


def owner_at(place: AxisLayout, shape: tuple[int, ...], batch: int, device: torch.device) -> Owner:
    """The owner of entries that lie so."""
    ids = torch.arange(shape[place.axis], device=device) // place.inner % batch
    return Owner(place.axis, ids, batch)
