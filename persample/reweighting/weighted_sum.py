"""Σ_b c_b g_b of a layer, straight from its inputs x and output gradients z: one weight gradient for each call.

The sum is linear in x and in z, so one of them is scaled by c, and the ordinary weight gradient is formed of the two.
Positions of one sample are more rows with the same factor, in any order: no axis is moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from persample.blocks.convolution import gradients as convolution
from persample.blocks.convolution.build import conv_block
from persample.blocks.precision import full_precision
from persample.blocks.products import weight_product

Parameters = tuple[Tensor | None, Tensor | None]
"""What belongs to a layer's weight, and to its bias; None for one that needs no gradient."""


def layer_sum(
    module: nn.Module | None,
    uses: Sequence[tuple[Tensor, Tensor]],
    needed: Sequence[bool],
    axis: int,
    c: Tensor | None = None,
) -> Parameters:
    """Returns Σ_b c_b g_b.

    Arguments:
        module: a linear or convolution layer; None: a linear function, given its weight.
        uses: (x, z) of each call, as the module received and returned them.
        needed: whether the weight, and whether the bias, needs a gradient.
        axis: which axis of x and z counts samples; for a convolution 0, and a sample may have images on an axis
            after it (`persample.reweighting.batch_axis.folded`).
        c: [B]; by default all ones.
    """
    weights, biases = [], []
    for x, z in uses:
        x, z = full_precision(x), full_precision(z)
        factors = None if c is None else c.to(z.dtype)
        if module is None or isinstance(module, nn.Linear):
            weight, bias = _linear(x, z, needed, axis, factors)
        else:
            weight, bias = _convolution(module, x, z, needed, factors)
        weights.append(weight)
        biases.append(bias)
    return _total(weights), _total(biases)


def _total(parts: list[Tensor | None]) -> Tensor | None:
    total, *rest = parts
    for part in rest:
        total = None if total is None or part is None else total + part
    return total


def _linear(x: Tensor, z: Tensor, needed: Sequence[bool], axis: int, c: Tensor | None) -> Parameters:
    rows = None if c is None else _rows_of(c, z.shape, axis)
    z, x = z.flatten(0, -2), x.flatten(0, -2)
    bias = None
    if needed[1]:
        bias = z.sum(0) if rows is None else rows @ z
    return weight_product(z, x, rows) if needed[0] else None, bias


def _rows_of(c: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """c for each row of a z of that shape."""
    return c.view(-1, *[1] * (len(shape) - 2 - axis)).expand(shape[:-1]).reshape(-1)


def _convolution(module: Any, x: Tensor, z: Tensor, needed: Sequence[bool], c: Tensor | None) -> Parameters:
    if x.dim() > module.weight.dim():  # images count as their sample does
        c = None if c is None else c.repeat_interleave(x.shape[1])
        x, z = x.flatten(0, 1), z.flatten(0, 1)
    bias = None
    if needed[1]:
        sums = z.flatten(2).sum(2)
        bias = sums.sum(0) if c is None else c @ sums
    if not needed[0]:
        return None, bias
    block = conv_block(module, x, z)
    return convolution.weighted_grad(block.x, block.z, block.spec, c), bias
