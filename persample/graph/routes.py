"""Routes: operations on parameters alone, through which rows are pulled back to a parameter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from persample.blocks.precision import full_precision
from persample.graph.calls import call_node_rows, inside_backward, outside
from persample.graph.nodes import Edge, Graph, Node, edge_dtype, edge_shape, saved_dim, signed

# Operations that only rearrange a tensor, each entry kept: inner products survive their pull-back.
REARRANGING = frozenset(
    f"{name}Backward{n}"
    for name in [
        "T",
        "Transpose",
        "Permute",
        "View",
        "UnsafeView",
        "ReshapeAlias",
        "Squeeze",
        "Unsqueeze",
        "Alias",
        "Clone",
        "Select",
        "Slice",
        "Split",
        "SplitWithSizes",
        "UnsafeSplit",
        "Unbind",
        "Movedim",
        "Contiguous",
        "Narrow",
        "Flip",
        "Detach",
    ]
    for n in range(3)
)


# Operations on a parameter alone that are never worth a cut: z behind them is a summed weight gradient.
SKIPPED = REARRANGING | {
    "ToCopyBackward0", "SparseCooTensorWithDimsAndTensorsBackward0", "ToSparseBackward0", "ToSparseBackward1",
    "ToDenseBackward0",
}  # fmt: skip


class Cut(NamedTuple):
    """A slice of a parameter: which one along an axis."""

    dim: int
    place: int


@dataclass(frozen=True)
class Route:
    """The operations between a parameter and one edge behind it, all on parameters alone (or summed over
    samples): rows at `source` pull back to rows of the parameter."""

    leaf: Node
    source: Edge
    nodes: tuple[Node, ...] = field(default=())
    """Outputs first."""
    watched: bool = True
    """Whether it is known that the operations have read no sample's data."""

    @property
    def cut(self) -> Cut | None:
        """Which slice of the parameter the route leads to; None where it is of all of it, or of several."""
        if not self.nodes or self.nodes[-1].next_functions[0][0] is not self.leaf:
            return None
        node, axes = self.nodes[-1], len(edge_shape((self.leaf, 0)))
        if node.name() not in ("SelectBackward0", "UnbindBackward0"):
            return None
        dim = saved_dim(node, axes)
        if node.name() == "SelectBackward0":
            return Cut(dim, signed(node._saved_index) % edge_shape((self.leaf, 0))[dim])
        ends = [self.source, *(edge for each in self.nodes[:-1] for edge in each.next_functions)]
        outputs = {output for source, output in ends if source is node}
        return Cut(dim, outputs.pop()) if len(outputs) == 1 else None

    @property
    def names(self) -> list[str]:
        """Kinds of the operations, the parameter's own last."""
        return [node.name() for node in self.nodes]

    @property
    def isometric(self) -> bool:
        """True where the route only rearranges entries, along one path."""
        return all(name in REARRANGING for name in self.names)

    def pull(self, rows: Tensor) -> Tensor:
        """Rows [n, *tensor at source] -> rows [n, *parameter], in float32 or better.

        Operations that compute are called in their own precision, those that rearrange keep that of the rows.
        """
        if len(self.nodes) > 1 and inside_backward():
            return outside(self.pull, rows)  # one other thread for all of them
        waiting: dict[Node, dict[int, Tensor]] = {self.source[0]: {self.source[1]: rows}}
        inside = {*self.nodes, self.leaf}
        for node in self.nodes:
            given = waiting.pop(node, {})
            if not given:
                continue
            cotangents = [given.get(k) for k in range(len(node._input_metadata))]
            if node.name() not in SKIPPED:
                cotangents = [c if c is None else c.to(edge_dtype((node, k))) for k, c in enumerate(cotangents)]
            slots = [slot for slot, (source, _) in enumerate(node.next_functions) if source in inside]
            for slot, grad in zip(slots, call_node_rows(node, cotangents, slots), strict=True):
                if grad is not None:
                    source, output = node.next_functions[slot]
                    slot_sums = waiting.setdefault(source, {})
                    slot_sums[output] = slot_sums[output] + grad if output in slot_sums else grad
        arrived = waiting.get(self.leaf)
        shape = edge_shape((self.leaf, 0))
        return rows.new_zeros(rows.shape[0], *shape) if arrived is None else full_precision(arrived[0])


def route(graph: Graph, leaf: Node, source: Edge, region: set[Node]) -> Route:
    """Returns the route from `leaf` to `source` inside `region`, the operations not yet cut."""
    nodes: set[Node] = set()
    stack = [source[0]]
    while stack:
        node = stack.pop()
        if node in region and node not in nodes:
            nodes.add(node)
            stack.extend(upstream for upstream, _ in node.next_functions if upstream is not None)
    return Route(leaf, source, tuple(sorted(nodes, key=graph.order.__getitem__, reverse=True)))
