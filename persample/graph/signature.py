"""Signatures: what a graph has in common with those of other batches, and whether a batch's graph has one.

A graph is compared with a signature in one walk from the losses, which ends at the first difference. It takes a part of
the time that tracing the graph does, forming its signature and looking for it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from torch import Tensor

from persample.graph.nodes import Graph, Node, shape_of

_STATIC = (
    "_saved_dim", "_saved_dims", "_saved_dim0", "_saved_dim1", "_saved_dim2", "_saved_dimension", "_saved_pad",
    "_saved_normalized_shape", "_saved_training", "_saved_reduction", "_saved_groups", "_saved_transposed",
)  # fmt: skip
_CUTS = {
    "SliceBackward0": ("start", "step"), "SelectBackward0": ("index",), "SplitBackward0": ("split_size",),
    "SplitWithSizesBackward0": ("split_sizes",), "UnsafeSplitBackward0": ("split_size",),
    "UnsafeSplitWithSizesBackward0": ("split_sizes",),
}  # fmt: skip
"""Where operations cut, by kind: as the shapes it may be other in a batch of the same structure."""
_WATCHED_AS = {"ReshapeAliasBackward0": "ViewBackward0"}
"""What an operation is called where nobody follows it, and where `Provenance` does."""
_static_of_kind: dict[str, tuple[str, ...]] = {}

Signature = tuple[tuple[Hashable, ...], ...]
"""By node: kind, edges, shapes and static attributes. Of a leaf its shape, and which parameter it is, if it is one."""
_LEAF = "torch::autograd::AccumulateGrad"


def signature(graph: Graph, parameters: Iterable[Tensor]) -> Signature:
    """Everything about the graph that a plan relies on.

    What the other leaves are (inputs that require a gradient) makes no difference: rows are gradients of the losses for
    parameters alone, and where samples lie is proven from the losses back to these.
    """
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    parts: list[tuple[Hashable, ...]] = []
    for node in graph.order:
        variable = getattr(node, "variable", None)
        if variable is not None:
            parts.append((_LEAF, places.get(id(variable)), tuple(variable.shape)))
            continue
        kind = kind_of(node)
        edges = tuple((graph.order.get(source), output) for source, output in node.next_functions)
        parts.append((kind, edges, *_details(node, kind)))
    return tuple(parts)


def walked(losses: Tensor, signature: Signature, parameters: Mapping[str, Tensor]) -> list[Node] | None:
    """The nodes behind the losses, sources first, if they have the signature; None where they have another."""
    if losses.grad_fn is None:
        return None
    given = list(parameters.values())
    places = {id(parameter): place for place, parameter in enumerate(given)}
    nodes: list[Node] = [None] * len(signature)
    nodes[-1] = losses.grad_fn
    for part, position in zip(reversed(signature), range(len(signature) - 1, -1, -1), strict=True):
        node = nodes[position]
        if node is None:
            return None
        kind = kind_of(node)
        if kind != part[0]:
            return None
        if kind == _LEAF:
            variable = node.variable
            if places.get(id(variable)) != part[1] or variable.shape != part[2]:
                return None
        elif not _follow(node, part[1], nodes) or _details(node, kind) != part[2:]:
            return None
    return nodes if len(set(nodes)) == len(nodes) else None


def _follow(node: Node, edges: Any, nodes: list[Node]) -> bool:
    """Notes the sources of a node at their positions; whether they may be there."""
    found = node.next_functions
    if len(found) != len(edges):
        return False
    for (source, output), (position, expected) in zip(found, edges, strict=True):
        if output != expected or (source is None) != (position is None):
            return False
        if source is not None:
            if nodes[position] is None:
                nodes[position] = source
            elif nodes[position] is not source:
                return False
    return True


def kind_of(node: Node) -> str:
    """What the operation of a node is called where nobody follows it."""
    name: str = node.name()
    return _WATCHED_AS.get(name, name)


def _details(node: Node, kind: str) -> tuple[Hashable, ...]:
    """Shapes and where the operation cuts, which may differ between batches of one structure, and what may not."""
    if kind not in _static_of_kind:
        _static_of_kind[kind] = tuple(name for name in _STATIC if hasattr(node, name))
    cuts = _CUTS.get(kind, ())
    return (
        (
            tuple([shape_of(meta) for meta in node._input_metadata]),
            tuple([_hashable(getattr(node, f"_saved_{name}")) for name in cuts]) if cuts else (),
        ),
        tuple([_hashable(getattr(node, name)) for name in _static_of_kind[kind]]),
    )


def _hashable(value: object) -> Hashable:
    return tuple(value) if isinstance(value, (list, tuple)) else value
