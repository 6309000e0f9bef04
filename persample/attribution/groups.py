"""Which losses share a forward row: all outputs of a sample, the losses of its tokens.

N losses that the graph has made of `count` rows, each with N / count losses, loss i belonging to row
(i // stride) mod count. Which pattern it is, the shapes on the way from the losses say, and the proof
(`persample.attribution.proof`) at the operations that parameters enter decides:

    losses [B·C] ◀─ view ◀─ outputs [B, C]        candidates: B rows of C losses, C rows of B losses, each loss its own
    parameters ─▶ first operation                 the finest of which the proof says that there a row is alone

Any pattern gives the same gradients; the right one needs C passes in place of N.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from persample.attribution.proof.layouts import Place
from persample.attribution.proof.proven import leading_to
from persample.attribution.proof.walk import places
from persample.attribution.uses import first_nodes
from persample.graph.nodes import Edge, Graph, Node, edge_shape

PRODUCTS = {
    "AddmmBackward0": slice(1, 3), "MmBackward0": slice(2), "BmmBackward0": slice(2), "BaddbmmBackward0": slice(1, 3),
    "AddmvBackward0": slice(1, 3), "MvBackward0": slice(2), "ConvolutionBackward0": slice(2),
}  # fmt: skip
"""Operations that multiply two tensors, with the slots of these."""
LOOKUPS = frozenset({"EmbeddingBackward0", "EmbeddingBagBackward0", "IndexBackward0", "IndexSelectBackward0"})
FAR = 256
"""Operations that are looked at on the way from the losses."""


@dataclass(frozen=True)
class Grouping:
    """Loss i of N belongs to row (i // stride) mod count."""

    count: int
    stride: int
    losses: int

    @property
    def contiguous(self) -> bool:
        """Whether the losses of a row are neighbours."""
        return self.count * self.stride == self.losses

    def rows(self, losses: Tensor) -> Tensor:
        """The losses by row, [count, N / count]."""
        return losses.view(-1, self.count, self.stride).transpose(0, 1).reshape(self.count, self.losses // self.count)


def grouping_of(graph: Graph, parameters: Mapping[str, Tensor], losses: int) -> Grouping | None:
    """Returns how the losses share rows; None where each has its own, or nothing is proven.

    Args:
        graph: traced from the losses.
        parameters: by name.
        losses: their number N.
    """
    candidates = list(dict.fromkeys(_candidates(graph, losses)))
    if not candidates:
        return None
    firsts: set[Node] = set()
    for parameter in parameters.values():
        if id(parameter) in graph.leaves:
            firsts |= {node for node, *_ in first_nodes(graph, graph.leaves[id(parameter)], set())}
    among = leading_to(graph, firsts)
    best, most = None, _proven(graph, firsts, among, Grouping(losses, 1, losses))
    for candidate in sorted(candidates, key=lambda each: -each.count):
        found = _proven(graph, firsts, among, candidate)
        if found > most:
            best, most = candidate, found
    return best


def _proven(graph: Graph, firsts: Iterable[Node], among: set[Node], grouping: Grouping) -> int:
    """At how many of these operations rows are apart."""
    start = Place(grouping.stride, 0, grouping.count)
    found = places(graph, {(graph.root, 0): start}, grouping.count, among=among, routed=True)

    def apart(edge: Edge) -> bool:
        place = found.known.get(edge)
        return edge in found.listed or (place is not None and place.axis_layout(edge_shape(edge)) is not None)

    return sum(all(apart((node, output)) for output in graph.outputs(node)) for node in firsts)


def _candidates(graph: Graph, losses: int) -> Iterator[Grouping]:
    """Patterns that the shapes of as many numbers as there are losses allow."""
    seen: set[Edge] = set()
    stack: list[Edge] = [(graph.root, 0)]
    while stack and len(seen) < FAR:
        edge = stack.pop()
        node = edge[0]
        if edge in seen or node is None or hasattr(node, "variable") or prod(edge_shape(edge)) != losses:
            continue
        seen.add(edge)
        stack.extend(node.next_functions)
        shape = edge_shape(edge)
        sizes = [(n, prod(shape[k + 1 :])) for k, size in enumerate(shape) for n in (size, prod(shape[: k + 1]))]
        if node.name() == "CatBackward0":
            sizes += [(prod(edge_shape(source)), 1) for source in node.next_functions if source[0] is not None]
        yield from (Grouping(n, inner, losses) for n, inner in sizes if 1 < n < losses and not losses % (n * inner))


def reading_data(graph: Graph, parameters: Iterable[Tensor]) -> set[Node]:
    """Products with what is no parameter: where they mix losses, that is for their rows being shared.

    Elsewhere losses mix because an operation has parameters alone (a table of positions, weight normalisation), and
    rows are told apart behind it. It makes no difference to a gradient, and one to its cost.
    """
    own = {id(parameter) for parameter in parameters}
    data: set[Node] = set()
    found: set[Node] = set()
    for node in graph.order:  # sources come first
        variable, factors = getattr(node, "variable", None), PRODUCTS.get(node.name())
        if variable is not None:
            given = id(variable) not in own
        else:
            given = node.name() in LOOKUPS or any(source in data for source, _ in node.next_functions)
            given = given or (factors is not None and any(s is None for s, _ in node.next_functions[factors]))
        if given:
            data.add(node)
            if factors is not None:
                found.add(node)
    return found
