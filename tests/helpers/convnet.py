"""What the tests of the `outputs` backend share: a small convolutional network, a batch of pictures, their losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.float() if outputs.dtype.itemsize < 4 else outputs, targets, reduction="none")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(8 * 36, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 6, 6), torch.randint(0, 5, (size,))
