"""Rows that data place: whose they are follows from the indices that operations have saved, for this batch.

    forward                                          backwards, from the owners of the output's rows
    h = x[index], x[mask], x.index_select            x's row index[r] is whose row r of h is, if all agree
    y = out.index_add(0, index, h), index_put, …     row r of h is whose row index[r] of y is
    y = A x, A of constants: edges of graphs         x's row j is whose the rows i of y with A_ij ≠ 0 are

So the routing of a mixture of experts takes a few operations on integers, and no backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from persample.attribution.owner import NOBODY
from persample.attribution.proof.layouts import Place, Rows, Shape, rows_of
from persample.graph.nodes import Node, saved_dim, signed
from persample.graph.saved import unpacked_by_hooks

Before = Callable[[Node, int, Rows, Shape, Shape], Place | Rows | None]
"""(node, slot, list of the output, its shape, that of the input) → list of the input."""
Axis = Callable[[Node, Shape], int]
"""(node, shape of the output) → the axis of the output along which data place rows."""
ROUTED: dict[str, tuple[Before, Axis]] = {}


def routed(*kinds: str, axis: Axis) -> Callable[[Before], Before]:
    """Registers where samples lie in the inputs of operations that take rows from, or put them, where data say."""

    def add(function: Before) -> Before:
        ROUTED.update({f"{kind}Backward{n}": (function, axis) for kind in kinds for n in range(3)})
        return function

    return add


def routed_before(
    node: Node, slot: int, at: Place | Rows, shape: Shape, entering: Shape, device: torch.device
) -> Place | Rows | None:
    """Whose the rows of an input are, by the list or the pattern of an output; None where indices do not tell.

    Nor where they come from hooks: in a checkpoint each that is read runs its segment again, and others can be read
    only once.
    """
    if entering and not prod(entering):
        return Rows.of_nobody(entering, device)
    if node.name() not in ROUTED or unpacked_by_hooks([node]):
        return None
    before, axis = ROUTED[node.name()]
    if isinstance(at, Place):  # all of one sample's is so along every axis
        along = axis(node, shape) if at.count == 1 else None
        rows = rows_of(at, shape, device, along)
    else:
        rows = at
    found = None if rows is None else before(node, slot, rows, shape, entering)
    return found.alone(entering) if isinstance(found, Rows) else found


def scattered(ids: Tensor, index: Tensor, size: int) -> Tensor | None:
    """The samples of `size` rows of which row index[r] is used for sample ids[r]; None where one is used for two."""
    known = ids != NOBODY
    index, ids = index[known] % max(size, 1), ids[known]
    found = torch.full((size,), NOBODY, device=ids.device)
    found[index] = ids
    return found if bool((found[index] == ids).all()) else None


def _indices(node: Node) -> list[Tensor | None]:
    """One index for each dimension; a mask is as many as it has dimensions."""
    found: list[Tensor | None] = []
    for each in node._saved_indices:
        if each is not None and each.dtype in (torch.bool, torch.uint8):
            found += each.nonzero().unbind(1)
        else:
            found.append(each)
    return found


def _indexed(node: Node) -> tuple[list[tuple[int, Tensor]], Shape, int]:
    """(axis that is indexed, index) for each, the shape that they broadcast to, and where in the output that stands."""
    pairs = [(axis, index) for axis, index in enumerate(_indices(node)) if index is not None]
    axes = [axis for axis, _ in pairs]
    together = axes == list(range(axes[0], axes[0] + len(axes))) if axes else True
    shape = torch.broadcast_shapes(*(index.shape for _, index in pairs))
    return pairs, tuple(shape), axes[0] if together and axes else 0


def _kept_axis(axis: int, indexed: Sequence[int], place: int, more: int) -> int:
    """The input's axis for one of the output that no index made; `more` axes stand at `place` for the indexed ones."""
    number = axis if axis < place else axis - more
    return [each for each in range(number + len(indexed) + 1) if each not in indexed][number]


@routed("Index", axis=lambda node, _: _indexed(node)[2])
def _index(node: Node, slot: int, at: Rows, shape: Shape, entering: Shape) -> Rows | None:
    pairs, made, place = _indexed(node)
    if not pairs:
        return at
    if not place <= at.axis < place + len(made):
        return Rows(_kept_axis(at.axis, [axis for axis, _ in pairs], place, len(made)), at.ids)
    number = at.axis - place
    ids = at.ids.view([-1 if k == number else 1 for k in range(len(made))]).expand(made).reshape(-1)
    for axis, index in pairs:
        found = scattered(ids, index.expand(made).reshape(-1), entering[axis])
        if found is not None:
            return Rows(axis, found)
    return None


@routed("IndexPut", "UnsafeIndexPut", axis=lambda node, _: next((k for k, _ in _indexed(node)[0]), 0))
def _index_put(node: Node, slot: int, at: Rows, shape: Shape, entering: Shape) -> Place | Rows | None:
    if slot == 0:
        return at
    pairs, made, place = _indexed(node)
    ids = next((at.ids[index % shape[axis]].expand(made) for axis, index in pairs if axis == at.axis), None)
    if len(entering) != len(made) + len(shape) - len(pairs) or entering[place : place + len(made)] != made:
        # Values that are broadcast are of one sample, or of none.
        one = None if ids is None else Rows(0, ids.reshape(-1)).alone(entering)
        return one if isinstance(one, Place) else None
    if ids is not None:
        return _along_one(ids, place)
    kept = at.axis - sum(axis < at.axis for axis, _ in pairs)
    return Rows(kept if kept < place else kept + len(made), at.ids)


def _along_one(ids: Tensor, place: int) -> Rows | None:
    """The list of rows whose samples [*axes] differ along one of these axes only."""
    if ids.dim() == 1:
        return Rows(place, ids)
    for axis in range(ids.dim()):
        flat = ids.movedim(axis, 0).reshape(ids.shape[axis], -1)
        if flat.numel() and bool((flat == flat[:, :1]).all()):
            return Rows(place + axis, flat[:, 0])
    return None


@routed("IndexSelect", axis=lambda node, shape: saved_dim(node, len(shape)))
def _index_select(node: Node, slot: int, at: Rows, shape: Shape, entering: Shape) -> Rows | None:
    dim = saved_dim(node, len(entering))
    if at.axis != dim:
        return at
    found = scattered(at.ids, node._saved_index, entering[dim])
    return None if found is None else Rows(dim, found)


def _gathered_axis(node: Node, shape: Shape) -> int:
    """Where entries of the last axis are picked, of features, rows stay as they are."""
    dim = saved_dim(node, len(shape))
    return 0 if 0 < dim == len(shape) - 1 else dim


@routed("Gather", axis=_gathered_axis)
def _gather(node: Node, slot: int, at: Rows, shape: Shape, entering: Shape) -> Rows | None:
    dim = saved_dim(node, len(entering))
    if at.axis != dim:
        return at if entering[at.axis] == shape[at.axis] else None
    ids = at.ids.view([-1 if k == dim else 1 for k in range(len(shape))]).expand(shape)
    found = scattered(ids.reshape(-1), node._saved_index.reshape(-1), entering[dim])
    return None if found is None else Rows(dim, found)


@routed("IndexAdd", "IndexCopy", axis=lambda node, shape: saved_dim(node, len(shape)))
def _index_add(node: Node, slot: int, at: Rows, shape: Shape, entering: Shape) -> Rows | None:
    dim = saved_dim(node, len(shape))
    if slot == 0 or at.axis != dim:
        return at
    return Rows(dim, at.ids[node._saved_index.reshape(-1) % shape[dim]])


@routed("ScatterAdd", "Scatter", axis=lambda node, shape: saved_dim(node, len(shape)))
def _scatter(node: Node, slot: int, at: Rows, shape: Shape, entering: Shape) -> Rows | None:
    dim, index = saved_dim(node, len(shape)), node._saved_index
    if slot == 0:
        return at
    if tuple(index.shape) != tuple(entering):
        return None
    if at.axis != dim:
        return at if entering[at.axis] == shape[at.axis] else None
    found = _along_one(at.ids[index], 0)
    return found if found is not None and found.axis == dim else None


@routed("MaskedSelect", axis=lambda *_: 0)
def _masked_select(node: Node, slot: int, at: Rows, shape: Shape, entering: Shape) -> Rows | None:
    mask: Any = node._saved_mask
    if torch.broadcast_shapes(mask.shape, entering) != torch.Size(entering):
        return None
    for axis, index in enumerate(mask.expand(entering).nonzero().unbind(1)):
        found = scattered(at.ids, index, entering[axis])
        if found is not None:
            return Rows(axis, found)
    return None


@routed("MaskedScatter", axis=lambda *_: 0)
def _masked_scatter(node: Node, slot: int, at: Rows, shape: Shape, entering: Shape) -> Rows | None:
    if slot == 0:
        return at
    places = node._saved_mask.expand(shape).nonzero()
    return _along_one(at.ids[places[:, at.axis]].view(entering), 0) if len(places) == prod(entering) else None


@routed("Flip", axis=lambda node, shape: signed(node._saved_dims[0]) % len(shape))
def _flip(node: Node, slot: int, at: Rows, shape: Shape, entering: Shape) -> Rows | None:
    dims = [signed(dim) % len(shape) for dim in node._saved_dims]
    return Rows(at.axis, at.ids.flip(0) if at.axis in dims else at.ids)


@routed("Roll", axis=lambda node, shape: signed(node._saved_dims[0]) % len(shape) if node._saved_dims else 0)
def _roll(node: Node, slot: int, at: Rows, shape: Shape, entering: Shape) -> Rows | None:
    dims, shifts = ([signed(each) for each in found] for found in (node._saved_dims, node._saved_shifts))
    if not dims:  # all entries as one row: whole rows, or nothing is known
        [shift], row = shifts, prod(shape[at.axis + 1 :])
        whole_rows = prod(shape[: at.axis]) == 1 and shift % row == 0
        return Rows(at.axis, at.ids.roll(-shift // row)) if whole_rows else None
    by = {dim % len(shape): shift for dim, shift in zip(dims, shifts, strict=True)}
    return Rows(at.axis, at.ids.roll(-by.get(at.axis, 0)))


@routed("Mm", "SparseAddmm", axis=lambda *_: 0)
def _adjacency(node: Node, slot: int, at: Rows, shape: Shape, entering: Shape) -> Rows | None:
    """A x with a constant matrix, as the edges of graphs are."""
    first = slot - 1
    if first < 0 or node.next_functions[first][0] is not None or at.axis != 0:
        return None
    matrix: Any = node._saved_mat1 if first else node._saved_self
    rows, columns = matrix.to_sparse_coo().coalesce().indices()
    found = scattered(at.ids[rows], columns, entering[0])
    return None if found is None else Rows(0, found)
