"""Nodes are called in threads of their own, which end: OpenMP slows down a process that keeps more than it needs."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

import persample


class Shifted(nn.Module):
    """An operation without a rule: its node is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(3, 4), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.hypot(self.layer(x), self.shift).sum(1)


def test_no_thread_stays() -> None:
    model, x = Shifted(), torch.randn(5, 3)
    model(x).sum().backward()
    before = threading.active_count()
    for _ in range(9):  # one of eight checks a use, too
        persample.per_sample(model, lambda losses, _: losses, x).norms()
    assert threading.active_count() == before
