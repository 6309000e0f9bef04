"""How many samples a model is called with, whatever they come in."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import persample
from persample.graph.batch_size import batch_size
from persample.result.holding.chunked import ChunkedPerSampleGrads

SIZE = 4


@dataclass
class Batch:
    name: str
    x: Tensor


class Reader(nn.Module):
    """A layer over positions, [T, B, D], and one over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.GRU(3, 5, batch_first=True)
        self.inner = nn.Linear(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, batch: Any) -> Tensor:
        if isinstance(batch, (UserDict, Batch)):
            batch = batch.x if isinstance(batch, Batch) else batch["x"]
        states, last = self.read(batch)
        times = last if isinstance(states, PackedSequence) else states.transpose(0, 1)
        return self.head(self.inner(times).tanh().mean(0))


def batches(x: Tensor) -> dict[str, Any]:
    return {
        "mapping": UserDict(name="a", x=x),
        "dataclass": Batch("a", x),
        "nested": [{"x": UserDict(x=x)}][0]["x"],
        "packed": pack_padded_sequence(x, [6, 5, 5, 1], batch_first=True),
    }


@pytest.mark.parametrize("kind", ["mapping", "dataclass", "nested", "packed"])
def test_samples_are_found(kind: str):
    """Against a batch of single samples, with a factor for each."""
    x, factors = torch.randn(SIZE, 6, 3, dtype=torch.float64), torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    model = Reader().double()
    batch = batches(x)[kind]
    expected = torch.autograd.grad((model(batch).sum(1) * factors).sum(), model.inner.weight)[0]
    assert batch_size((batch,), {}) == SIZE
    assert batch_size((), {"first": None, "batch": batch}) == SIZE
    with persample.reweight(model, lambda layer, grads: factors):
        model(batch).sum().backward()
    torch.testing.assert_close(model.inner.weight.grad, expected, rtol=1e-12, atol=1e-14)


def test_nothing_that_holds_tensors():
    assert batch_size((torch.tensor(1.0), "a", [None], Batch), {}) is None


class Placed(nn.Module):
    """Positions that all samples share, in front of the samples, as users may write their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        return self.inner(x + positions.view(1, -1, 1)).tanh().sum((1, 2))


@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 6, 1)])
def test_what_samples_share_may_come_first(shape: tuple[int, ...]):
    x, factors = torch.randn(SIZE, 6, 3, dtype=torch.float64), torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    positions, model = torch.arange(6, dtype=torch.float64).view(shape), Placed().double()
    expected = torch.autograd.grad(model(positions, x) @ factors, model.inner.weight)[0]
    with persample.reweight(model, lambda layer, grads: factors):
        model(positions, x).sum().backward()
    torch.testing.assert_close(model.inner.weight.grad, expected, rtol=1e-12, atol=1e-14)
    chunks = persample.per_sample(model, lambda losses, _: losses, (positions, x), chunk_size=3)
    assert isinstance(chunks, ChunkedPerSampleGrads)
    assert chunks.batch == SIZE


def test_a_last_batch_of_one_sample_is_one():
    """Beside a bank that all samples share, of as many features."""

    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor, bank: Tensor) -> Tensor:
            return self.inner(x) @ bank.T

    sizes, bank = [], torch.randn(7, 3)
    model = Bank()
    with persample.reweight(model, lambda layer, grads: sizes.append(grads.batch_size)):
        for batch in (5, 1):
            model(torch.randn(batch, 3), bank).sum().backward()
    assert sizes == [5, 1]


def test_graphs_of_one_sample_are_one():
    assert batch_size((), {"x": torch.zeros(1, 9, 5), "edges": torch.zeros(2, 30)}) == 1
