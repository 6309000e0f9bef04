"""Building blocks that several of the small architectures use."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn


def heads(x: Tensor, n: int = 2) -> Tensor:
    """[B, T, n · d] to [B, n, T, d]."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention on [B, n, T, d], the heads joined again: [B, T, n · d]."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def mlp(size: int, hidden: int = 16) -> nn.Sequential:
    """The two-layer network of a Transformer block."""
    return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))


class RMSNorm(nn.Module):
    """Llama's own norm; the original computes it in float32 whatever the model's type."""

    def __init__(self, size: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(self.dtype)
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def dense(*sizes: int) -> nn.Sequential:
    """Linear layers with SiLU between."""
    layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.SiLU())]
    return nn.Sequential(*layers[:-1])
