"""Calling a node of the autograd graph on gradients of one's own: once, or for many rows at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from persample.graph.nodes import Node, Result, edge_dtype, edge_shape, shape_of
from persample.graph.recomputed import reading_beside
from persample.graph.saved import unpacked_by_hooks


def inside_backward() -> bool:
    """Whether this thread is in a backward pass, where a node silently leaves out what the pass does not need."""
    return torch._C._current_graph_task_id() != -1 or reading_beside()


def outside(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls the function in a thread that is in no backward pass, without recording a graph.

    A new thread each time: one that stayed would keep threads for its kernels, and where these are more than there are
    processors, OpenMP puts all of them to sleep after every kernel, in plain training too.
    """

    def call() -> Result:
        with torch.no_grad():
            return function(*arguments)

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(call).result()


def without_call(
    node: Node, z: Tensor | None, slot: int, saved: Callable[[str], Tensor | None] | None = None
) -> Tensor | None:
    """A sum's or product's gradient for an input, before any reduction; None where the node has to be called.

    Calling takes another thread inside of a backward pass, which lasts longer than small products do.

    Args:
        node: of the operation.
        z: gradient of its output.
        slot: of the input.
        saved: reads a saved tensor of the node; without it, one is read where that can be done as often as one likes.
    """
    kind = node.name()
    if z is None or kind not in ("AddBackward0", "MulBackward0") or edge_dtype(node.next_functions[slot]) != z.dtype:
        return None
    if kind == "AddBackward0":
        return z if slot == 0 or node._saved_alpha == 1 else None
    if saved is None and unpacked_by_hooks([node]):
        return None
    name = "other" if slot == 0 else "self"
    factor: Tensor | None = getattr(node, f"_saved_{name}") if saved is None else saved(name)
    if factor is None or factor.dtype != z.dtype or z.is_complex() or factor.layout != z.layout:
        return None
    return z * factor.detach()


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
    if len(slots) == 1 and (grad := without_call(node, cotangents[0], slots[0])) is not None:
        return [sum_to(grad, (grad.shape[0], *edge_shape(node.next_functions[slots[0]])))]
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
