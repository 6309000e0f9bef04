"""For the tests of memory that is reused: a layer, the rows of its weight, and ways to see what is kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import persample
from persample import memory
from persample.memory import pool
from persample.result.per_sample_grads import PerSampleGrads

NAN = b"\xff"
"""Of which floating-point numbers consist that are none."""


@pytest.fixture
def small_results_are_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results of any size are reused, and nothing is kept before and after."""
    monkeypatch.setattr(memory, "SMALLEST", 1)
    before = memory.reuse(True)
    memory.release()
    yield
    memory.reuse(before)
    memory.release()


def layer() -> nn.Linear:
    """5 inputs, 7 outputs."""
    return nn.Linear(5, 7, bias=False).double()


def linear(model: nn.Module, batch: int = 4, seed: int = 0) -> tuple[PerSampleGrads, Tensor]:
    """Per-sample gradients of a layer, and what those of its weight are, [B, 7, 5]."""
    random = torch.Generator().manual_seed(seed)
    x, c = (torch.randn(batch, size, generator=random, dtype=torch.float64) for size in (5, 7))
    psg = persample.per_sample(model, lambda y, c: (c * y).sum(1), x, c)
    assert isinstance(psg, PerSampleGrads)
    return psg, c[:, :, None] * x[:, None, :]


def poison() -> int:
    """Overwrites what is kept, and returns how many bytes that is."""
    for slot in pool._slots.values():
        for block in slot.free:
            block[:] = NAN * len(block)
    return memory.kept()


def warm(psg: PerSampleGrads) -> int:
    """Two calls, of which the second one's memory is kept; returns its address."""
    psg.grads()
    address = psg.grads()["weight"].data_ptr()
    assert poison() > 0
    return address
