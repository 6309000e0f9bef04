"""The autograd graph of a batch: who uses a parameter, and pulling rows back through parameter-only operations.

Nodes are autograd's own (`tensor.grad_fn`). An edge (node, k) is output k of the operation the node belongs to;
slot j of a node is its input j, fed by the edge `node.next_functions[j]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from persample.errors import UnsupportedError

Node = Any  # torch.autograd.graph.Node; the stubs lack _input_metadata and saved tensors
Edge = tuple[Node, int]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Graph:
    """Nodes that the losses depend on, inputs before outputs, and who consumes what each of them puts out."""

    order: dict[Node, int]
    """Topological position: a node comes after everything it consumes."""
    consumers: dict[Node, list[tuple[Node, int, int]]]
    """node -> (consumer, slot of the consumer, output of the node)."""
    leaves: dict[int, Node]
    """id of a leaf tensor -> its AccumulateGrad node."""
    root: Node | None
    """Node of the losses; None when they need no gradient."""

    def outputs(self, node: Node) -> list[int]:
        """Outputs of the node that something consumes; the root's own output counts."""
        used = {output for _, _, output in self.consumers.get(node, ())}
        return sorted(used | ({0} if node is self.root else set()))


def trace(losses: Tensor) -> Graph:
    """Returns the graph of `losses` [B].

    Raises:
        UnsupportedError: reentrant checkpoints, inside which no parameter can be seen.
    """
    root = losses.grad_fn
    order: dict[Node, int] = {}
    consumers: dict[Node, list[tuple[Node, int, int]]] = {}
    leaves: dict[int, Node] = {}
    stack: list[tuple[Node, Iterator]] = [(root, iter(root.next_functions))] if root is not None else []
    seen = {root}
    while stack:
        node, edges = stack[-1]
        for source, _ in edges:
            if source is not None and source not in seen:
                seen.add(source)
                stack.append((source, iter(source.next_functions)))
                break
        else:
            stack.pop()
            order[node] = len(order)
            for slot, (source, output) in enumerate(node.next_functions):
                if source is not None:
                    consumers.setdefault(source, []).append((node, slot, output))
            variable = getattr(node, "variable", None)
            if variable is not None:
                leaves[id(variable)] = node
    if any(node.name() == "CheckpointFunctionBackward" for node in order):
        raise UnsupportedError(
            "the model uses torch.utils.checkpoint with use_reentrant=True, which hides the parameters inside from the "
            "graph. Pass use_reentrant=False"
        )
    return Graph(order, consumers, leaves, root)


def signed(value: int) -> int:
    """A saved dimension or index as Python counts it: autograd keeps C++ integers, of which −1 is the largest."""
    return value - 2**64 if value >= 2**63 else value


def saved_dim(node: Node, axes: int) -> int:
    """The dimension that a node has saved, of so many, counted from the front."""
    return signed(node._saved_dim) % max(axes, 1)


def edge_shape(edge: Edge) -> tuple[int, ...]:
    """Shape of the tensor at an edge."""
    node, output = edge
    variable = getattr(node, "variable", None)
    return tuple(variable.shape) if variable is not None else shape_of(node._input_metadata[output])


def edge_dtype(edge: Edge) -> torch.dtype:
    """Precision of the tensor at an edge."""
    node, output = edge
    variable = getattr(node, "variable", None)
    found: torch.dtype = variable.dtype if variable is not None else node._input_metadata[output].dtype
    return found


def precision_within(losses: Tensor) -> torch.dtype:
    """The dtype with the largest rounding error on the way to the losses: a layer may compute in one of its own."""
    if losses.grad_fn is None:
        return losses.dtype
    dtypes = {losses.dtype}
    for node in trace(losses).order:
        dtypes |= {edge_dtype((node, k)) for k in range(1 if hasattr(node, "variable") else len(node._input_metadata))}
    real = [dtype.to_real() for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
    return max(real, key=lambda dtype: torch.finfo(dtype).eps)


def shape_of(meta: Any) -> tuple[int, ...]:
    """Shape of a tensor by its autograd metadata.

    Raises:
        UnsupportedError: a nested tensor, which has none.
    """
    try:
        shape = tuple(meta.shape)
    except RuntimeError as error:
        raise nested_error() from error
    for size in shape:
        if not isinstance(size, int):  # jagged: one of the sizes is a symbol
            raise nested_error()
    return shape


def refuse_nested(graph: Graph) -> None:
    """Raises `UnsupportedError` for a graph with nested tensors in it."""
    for node in graph.order:
        for meta in () if hasattr(node, "variable") else node._input_metadata:
            shape_of(meta)


def nested_error() -> UnsupportedError:
    """The error for nested tensors, of either layout."""
    return UnsupportedError(
        "the model computes with nested tensors, whose rows have no common shape and cannot be told apart. "
        "Use padded tensors with a mask, or a list of tensors"
    )
