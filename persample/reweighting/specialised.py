"""A layer's weighted sum with everything decided that its shapes decide: for steps that repeat, with factors at hand.

Between two convolutions the caches hold images, and every Python function that runs must be read from memory again: a
layer of a stored step took 0.4 ms, of which a tight loop shows a quarter. So what can be decided once is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from persample.blocks.convolution.build import conv_block
from persample.blocks.convolution.gradients import summing
from persample.reweighting.weighted_sum import Parameters, layer_sum

Sum = Callable[[Tensor, Tensor, Tensor], Parameters]
"""(x, z, c) → Σ_b c_b g_b for weight and bias."""


def signature(module: Any, x: Tensor, z: Tensor, needed: Sequence[bool], axis: int) -> Hashable:
    """Returns what a prepared sum depends on."""
    own = x.shape, z.shape, x.dtype, z.dtype, x.device, needed, axis
    if module is None or isinstance(module, nn.Linear):
        return own
    weight = module._parameters.get("weight")  # with strides, kernels of several sizes lead to one shape of z
    shape = None if weight is None else weight.shape
    return own, shape, module.stride, module.padding, module.dilation, module.groups, module.padding_mode


def prepare(module: Any, x: Tensor, z: Tensor, needed: Sequence[bool], axis: int) -> Sum:
    """Returns the sum for all calls with this signature."""
    ordinary = x.dtype == z.dtype and x.dtype in (torch.float32, torch.float64) and len(x)
    if ordinary and tuple(needed) == (True, False) and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        block = conv_block(module, x, z)
        if block.x is x:
            total = summing(x, z, block.spec)
            return lambda x, z, c: (total(x, z, c if c.dtype == z.dtype else c.to(z.dtype)), None)
    return lambda x, z, c: layer_sum(module, [(x, z)], needed, axis, c)
