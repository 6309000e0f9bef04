"""The autograd graph of a batch: who uses a parameter, and pulling rows back through parameter-only operations.

Nodes are autograd's own (`tensor.grad_fn`). An edge (node, k) is output k of the operation the node belongs to;
slot j of a node is its input j, fed by the edge `node.next_functions[j]`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from persample.blocks.precision import full_precision
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
    if not all(isinstance(size, int) for size in shape):  # jagged: one of the sizes is a symbol
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


def inside_backward() -> bool:
    """Whether this thread is in a backward pass, where a node silently leaves out what the pass does not need."""
    return torch._C._current_graph_task_id() != -1


def outside(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls the function in a thread that is in no backward pass, without recording a graph."""

    def call() -> Result:
        with torch.no_grad():
            return function(*arguments)

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(call).result()


def call_node(node: Node, cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Returns the node's gradients for its inputs, before any reduction over broadcast dimensions."""
    if inside_backward():
        return outside(call_node, node, cotangents)
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        cotangents = _filled(node, cotangents)
    grads = node(*cotangents) if callable(node) else node.apply(*cotangents)
    grads = grads if isinstance(grads, tuple) else (grads,)
    if len(grads) == len(node.next_functions):
        return grads
    # The backward of a custom Function answers for every argument, its slots are the tensors among them; those that
    # need a gradient are the same in both.
    wanted = (grad for grad, needed in zip(grads, node.needs_input_grad, strict=False) if needed)
    return tuple(None if source is None else next(wanted, None) for source, _ in node.next_functions)


def _filled(node: Node, cotangents: Sequence[Tensor | None]) -> list[Tensor]:
    """Zeros where nothing depends on an output: the engine hands them to a custom Function, unless told not to."""
    like = next(cotangent for cotangent in cotangents if cotangent is not None)
    return [
        torch.zeros(shape_of(meta), dtype=meta.dtype, device=like.device) if cotangent is None else cotangent
        for cotangent, meta in zip(cotangents, node._input_metadata, strict=True)
    ]


_BATCHED: dict[str, bool] = {}
"""Kind of node → whether torch's rule for calling it on many rows at once gives what it gives row by row."""


def call_node_rows(node: Node, cotangents: Sequence[Tensor | None], slots: Sequence[int]) -> list[Tensor | None]:
    """The node called on n rows of cotangents at once, [n, *output]: gradients [n, *input] of the given slots.

    Broadcasting is undone: each gradient has the shape of the tensor that enters its slot.
    """
    if inside_backward():
        return outside(call_node_rows, node, cotangents, slots)
    present = [k for k, cotangent in enumerate(cotangents) if cotangent is not None]
    rows: list[Tensor] = [cotangent for cotangent in cotangents if cotangent is not None]
    count = rows[0].shape[0]
    shapes = [edge_shape(node.next_functions[slot]) for slot in slots]

    def one(*given: Tensor) -> list[Tensor | None]:
        full: list[Tensor | None] = [None] * len(cotangents)
        for k, cotangent in zip(present, given, strict=True):
            full[k] = cotangent
        grads = call_node(node, full)
        return [grads[slot] for slot in slots]

    kind = node.name()
    if count > 1 and _BATCHED.get(kind, True):
        try:
            found = [
                g if g is None else sum_to(g, (count, *s)) for g, s in zip(_batched(one, rows), shapes, strict=True)
            ]
        except Exception:
            pass  # no batching rule, or a custom Function that vmap refuses: the loop below is exact, only slower
        else:
            if kind not in _BATCHED:
                _compare_batched(kind, found, {i: one(*(row[i] for row in rows)) for i in {0, count // 2, count - 1}})
            if _BATCHED.get(kind, True):
                return found
    singles = [one(*(row[i] for row in rows)) for i in range(count)]
    result: list[Tensor | None] = []
    for place, shape in enumerate(shapes):
        grads = [single[place] for single in singles]
        if all(grad is None for grad in grads) and count:
            result.append(None)
        else:  # a custom Function may leave out the gradient of some rows: they are zero
            each = [
                rows[0].new_zeros(shape) if g is None else sum_to(g.to_dense()[None], (1, *shape))[0] for g in grads
            ]
            result.append(torch.stack(each) if each else rows[0].new_zeros(0, *shape))
    return result


def _compare_batched(
    kind: str, batched: Sequence[Tensor | None], singles: Mapping[int, Sequence[Tensor | None]]
) -> None:
    """Finds out whether torch's batching rule is right, from the first rows that are not zero.

    That of `cdist`'s backward is not, in torch 2.13.
    """
    for row, single in singles.items():
        for many, alone in zip(batched, single, strict=True):
            if many is None or alone is None:
                continue
            expected = sum_to(alone.to_dense()[None], (1, *many.shape[1:]))[0]
            norm = torch.linalg.vector_norm(expected)
            if bool(norm.isfinite()) and bool(norm > 0):
                allowed = norm * torch.finfo(expected.dtype).eps ** 0.5
                right = bool(torch.linalg.vector_norm(many[row] - expected) <= allowed)
                _BATCHED[kind] = _BATCHED.get(kind, True) and right


def _batched(function: Callable[..., list[Tensor | None]], rows: Sequence[Tensor]) -> list[Tensor | None]:
    """`function` over dimension 0 of the rows with vmap; None among its results stays None."""
    there: list[bool] = []

    def without_none(*given: Tensor) -> tuple[Tensor, ...]:
        results = function(*given)
        there[:] = [result is not None for result in results]
        return tuple(result for result in results if result is not None)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # the fallback is what we want
        found = iter(torch.vmap(without_none)(*rows))
    return [next(found) if present else None for present in there]


def sum_to(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """`grad` [n, *broadcast] summed to `shape` [n, *input], what the engine does after each node."""
    if tuple(grad.shape) == tuple(shape):
        return grad
    extra = grad.ndim - len(shape)
    if extra > 0:
        grad = grad.sum(tuple(range(1, 1 + extra)))
    stretched = tuple(d for d in range(1, len(shape)) if shape[d] == 1 and grad.shape[d] != 1)
    return grad.sum(stretched, keepdim=True) if stretched else grad.reshape(tuple(shape))


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
