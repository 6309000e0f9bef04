"""The block of a convolution module's weight: its geometry as `persample.convolution` takes it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from persample.blocks import Conv
from persample.convolution import ConvSpec

_spec = lru_cache(ConvSpec)  # the same few in every step


def conv_block(module: Any, x: Tensor, z: Tensor) -> Conv:
    """Returns the block of a convolution module's weight from its input and output gradient, every padding included."""
    kernel, padding = module.kernel_size, module.padding
    output_padding = (0,) * len(kernel)
    if module.transposed:
        # From the shapes, because the call's `output_size=` overrides the module's own.
        sizes = (z.shape[2:], x.shape[2:], module.stride, padding, module.dilation, kernel)
        output_padding = tuple(
            out - ((n - 1) * s - 2 * p + d * (k - 1) + 1) for out, n, s, p, d, k in zip(*sizes, strict=True)
        )
    else:
        # As the module does it: 'same' may need one more element on one side, and other modes copy.
        both = module._reversed_padding_repeated_twice
        if module.padding_mode != "zeros" or isinstance(padding, str):
            if module.padding_mode == "zeros" and both[0::2] == both[1::2]:
                padding = tuple(both[0::2][::-1])
            else:
                mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
                x, padding = F.pad(x, both, mode=mode), output_padding
    shape = tuple(module.weight.shape)
    geometry = module.stride, padding, module.dilation, module.transposed, output_padding, module.groups
    return Conv(x, z, _spec(shape, *geometry))
