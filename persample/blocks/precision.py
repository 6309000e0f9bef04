"""Precision: half precision is accumulated, and returned, in float32; checks allow for the coarsest one involved."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32 where it is half precision, unchanged otherwise."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def coarsest(*tensors: Tensor) -> torch.dtype:
    """The dtype with the largest rounding error among the tensors'."""
    return max((tensor.dtype for tensor in tensors), key=lambda dtype: torch.finfo(dtype).eps)
