"""The block of a convolution module's weight: its geometry as `persample.blocks.convolution.gradients` takes it.

It is read as the module's forward reads it, in each call: an attribute may have been given another value since, and a
single number stands for all axes then.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from persample.blocks.convolution.gradients import ConvSpec
from persample.blocks.types import Conv

_spec = lru_cache(ConvSpec)  # the same few in every step


def conv_block(module: Any, x: Tensor, z: Tensor) -> Conv:
    """Returns the block of a convolution module's weight from its input and output gradient, every padding included."""
    shape = tuple(module.weight.shape)
    kernel = shape[2:]
    axes = len(kernel)
    stride, dilation = each(module.stride, axes), each(module.dilation, axes)
    zeros = output_padding = (0,) * axes
    if module.padding_mode != "zeros":  # the forward pads by what the module was made with
        x, around = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), zeros
    else:
        both = padding(module)
        if both is None:
            x, around = F.pad(x, _same(kernel, dilation)), zeros
        else:
            around = both
    if module.transposed:
        # From the shapes, because the call's `output_size=` overrides the module's own.
        sizes = (z.shape[2:], x.shape[2:], stride, around, dilation, kernel)
        output_padding = tuple(
            out - ((n - 1) * s - 2 * p + d * (k - 1) + 1) for out, n, s, p, d, k in zip(*sizes, strict=True)
        )
    return Conv(x, z, _spec(shape, stride, around, dilation, module.transposed, output_padding, module.groups))


def padding(module: Any) -> tuple[int, ...] | None:
    """Zeros at either end of each axis, read as the module's forward reads them; None where the ends differ."""
    given, space = module.padding, module.weight.shape[2:]
    if given == "same":
        ends = _same(space, each(module.dilation, len(space)))
        return ends[0::2][::-1] if ends[0::2] == ends[1::2] else None
    return (0,) * len(space) if given == "valid" else each(given, len(space))


def _same(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """What 'same' adds, as `F.pad` takes it, the last axis first; an odd number has its one more at the far end."""
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return tuple(end for total in reversed(totals) for end in (total // 2, total - total // 2))


def each(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """One number for each of `count` axes: functions take a single one for all."""
    if isinstance(value, int):
        return (value,) * count
    return tuple(value) if len(value) == count else tuple(value) * count
