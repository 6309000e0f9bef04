"""Sums over the patches of a convolution's input that never write the patches out.

A patch view x [batch, groups, inp, *kernel, *time] (`LayerGrads.factors`) shows each element of the padded input once
for every kernel element that covers it. Along one axis, with stride s and dilation d,

    x[…, i, …, t, …] = input[…, t·s + i·d, …]    i < k,  t < T,    n = (T − 1)s + (k − 1)d + 1 elements.

Both sums below read `input` instead of x:

    Σ_t x_bt         one product with a matrix of zeros and ones for each axis                      [inp, *kernel]
    Σ_bt x_bt x_btᵀ  rows r = t + i of the first axis meet rows r + δ, δ = i' − i: for each of the k differences one
                     product over the rows that all i have in common, and a few rows more for each i. With k kernel
                     elements on the first axis k products replace the k² of the patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

CACHE = 2**18
"""Numbers that are unfolded at a time: small enough to stay in a core's cache, and used again and again."""


@dataclass(frozen=True)
class Axis:
    """Along one axis: kernel elements k, positions T, stride s and dilation d in elements of the input."""

    kernel: int
    time: int
    stride: int
    dilation: int

    @property
    def size(self) -> int:
        return (self.time - 1) * self.stride + (self.kernel - 1) * self.dilation + 1


def padded_input(x: Tensor) -> tuple[Tensor, list[Axis]] | None:
    """Returns the input [batch, groups, inp, *n] that x is a view of, and its axes; None where x is no such view."""
    dims = (x.dim() - 3) // 2
    shape, step, axes = list(x.shape[:3]), list(x.stride()[:3]), []
    if x.dim() != 3 + 2 * dims or not x.numel():
        return None
    for at in range(3, 3 + dims):
        kernel, time = x.shape[at], x.shape[at + dims]
        across, along = (x.stride(at) if kernel > 1 else 0), (x.stride(at + dims) if time > 1 else 0)
        unit = math.gcd(across, along) or 1
        if (kernel > 1 and not across) or (time > 1 and not along):  # expanded
            return None
        axes.append(Axis(kernel, time, max(along // unit, 1), max(across // unit, 1)))
        shape.append(axes[-1].size)
        step.append(unit)
    return x.as_strided(shape, step, x.storage_offset()), axes


@lru_cache(maxsize=512)
def _covered(axis: Axis, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "n kernel"]:
    """1 where kernel element i meets input element p at some position."""
    result = torch.zeros(axis.size, axis.kernel)
    for i in range(axis.kernel):
        result[i * axis.dilation :: axis.stride, i][: axis.time] = 1.0
    return result.to(dtype=dtype, device=device)


def summed_patches(x: Tensor, *, batch: bool = False) -> Tensor:
    """Returns Σ_t x_bt, [batch, groups, inp, *kernel]; with batch=True Σ_bt x_bt without the first axis.

    >>> x = torch.arange(4.0).unfold(0, 3, 1).T.reshape(1, 1, 1, 3, 2)  # patches [0, 1, 2] and [1, 2, 3]
    >>> summed_patches(x)
    tensor([[[[1., 3., 5.]]]])
    """
    found = padded_input(x)
    if found is None:
        time = tuple(range(3 + (x.dim() - 3) // 2, x.dim()))
        axes_summed = (0, *time) if batch else time
        return x.sum(axes_summed) if axes_summed else x
    result, axes = found
    if batch:
        result = result.sum(0)
    first = result.dim() - len(axes)
    for at in reversed(range(len(axes))):  # the last axis first: that product needs no copy and leaves least
        if axes[at] != Axis(1, 1, 1, 1):
            moved = result.movedim(first + at, -1) @ _covered(axes[at], x.dtype, x.device)
            result = moved.movedim(-1, first + at)
    return result


def patch_moment(x: Tensor) -> Float[Tensor, "groups features features"]:
    """Returns Σ_bt x_bt x_btᵀ, with features = inp·kernel.

    >>> x = torch.arange(4.0).unfold(0, 3, 1).T.reshape(1, 1, 1, 3, 2)
    >>> patch_moment(x)
    tensor([[[ 1.,  2.,  3.],
             [ 2.,  5.,  8.],
             [ 3.,  8., 13.]]])
    """
    found = padded_input(x)
    if found is None or found[1][0].stride != 1:
        return _unfolded_moment(x)
    dims, axis = len(found[1]), found[1][0]
    # [batch, groups, inp, *other kernel axes, rows, *other time axes]: unfolded but for the first axis
    shape, step = list(x.shape), list(x.stride())
    unit = x.stride(3 + dims) if axis.time > 1 else x.stride(3) if axis.kernel > 1 else 1
    shape[3 + dims], step[3 + dims] = axis.size, unit
    del shape[3], step[3]
    view = x.as_strided(shape, step, x.storage_offset())
    batch, groups, kernel, rows = len(x), x.shape[1], axis.kernel, 2 + dims
    features = math.prod(shape[2:rows])
    others = math.prod(shape[rows + 1 :])
    order = (1, *range(2, rows), rows, 0, *range(rows + 1, view.dim()))
    blocks = x.new_zeros(kernel, kernel, groups, features, features)
    at_once = max(1, CACHE // (groups * features * axis.size * others))
    buffer = x.new_empty(0)
    for part in view.split(at_once):
        ordered = part.permute(order)
        if buffer.shape != ordered.shape:
            buffer = x.new_empty(ordered.shape)
        unfolded = buffer.copy_(ordered).view(groups, features, axis.size, len(part) * others)
        for delta in range(kernel):
            _add_difference(blocks, unfolded, delta, axis)
    for i in range(kernel):
        for j in range(i):
            blocks[i, j] = blocks[j, i].mT
    # [i, j, groups, (inp, rest), (inp', rest')] -> [groups, (inp, i, rest), (inp', j, rest')]
    inp, rest = x.shape[2], features // x.shape[2]
    split = blocks.view(kernel, kernel, groups, inp, rest, inp, rest).permute(2, 3, 0, 4, 5, 1, 6)
    assert batch, "empty views are no views"
    return split.reshape(groups, features * kernel, features * kernel)


def _add_difference(blocks: Tensor, rows: Tensor, delta: int, axis: Axis) -> None:
    """Adds to each block (i, i + δ) the products of rows r and r + δd for the T rows r = id … id + T − 1."""
    step, time = axis.dilation, axis.time
    last = axis.kernel - 1 - delta
    shift = delta * step

    def product(start: int, stop: int) -> Tensor:
        return rows[:, :, start:stop].flatten(2) @ rows[:, :, start + shift : stop + shift].flatten(2).mT

    start, stop = last * step, time
    common: Any = product(start, stop) if start < stop else 0.0
    for i in range(last + 1):
        block = blocks[i, i + delta]
        if start >= stop:
            block += product(i * step, i * step + time)
            continue
        block += common
        if i < last:
            block += product(i * step, start)
        if i:
            block += product(stop, i * step + time)


def with_ones(
    moment: Float[Tensor, "groups n n"], total: Float[Tensor, "groups n"], count: int
) -> Float[Tensor, "groups m m"]:
    """Returns the moment of rows r_i with 1 appended, from Σ r_i r_iᵀ, Σ r_i and the number of rows."""
    side = total.unsqueeze(2)
    corner = side.new_full((len(side), 1, 1), count)
    return torch.cat([torch.cat([moment, side], 2), torch.cat([side.mT, corner], 2)], 1)


def _unfolded_moment(x: Tensor) -> Float[Tensor, "groups features features"]:
    """The same by patches, a few samples at a time."""
    dims = (x.dim() - 3) // 2
    groups, features = x.shape[1], math.prod(x.shape[2 : 3 + dims])
    steps = math.prod(x.shape[3 + dims :])
    order = (1, *range(2, 3 + dims), 0, *range(3 + dims, x.dim()))
    result = x.new_zeros(groups, features, features)
    for part in x.split(max(1, CACHE // max(1, groups * features * steps))):
        columns = part.permute(order).reshape(groups, features, len(part) * steps)
        result.baddbmm_(columns, columns.mT)
    return result
