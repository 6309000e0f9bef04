"""Layers whose rows were once as many as the samples, and are no samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from persample import reweight


class Selecting(nn.Module):
    """A head on the selected tokens of all samples, as masked language models have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, selected: Tensor) -> Tensor:
        return self.head(self.embed(x)[selected])


def selection(count: int) -> Tensor:
    return (torch.arange(30).view(5, 6) * 7 % 30) < count


def test_rows_that_are_no_samples_are_refused_when_their_number_changes() -> None:
    model, x = Selecting(), torch.randn(5, 6, 4)
    with reweight(model, lambda layer, grads: torch.ones(grads.batch_size)):
        model(x, selection(5)).sum().backward()  # as many as there are samples: sizes do not tell
        with pytest.raises(ValueError, match=r"layer 'head' .* shape \[8, 3\].* 5 samples"):
            model(x, selection(8)).sum().backward()


def test_rows_that_the_user_calls_samples_may_be_any_number() -> None:
    model, x, sizes = Selecting(), torch.randn(5, 6, 4), []

    def policy(layer: str, grads: object) -> None:
        if layer == "head":
            sizes.append(grads.batch_size)  # type: ignore[attr-defined]

    with reweight(model, policy, batch_axis={"head": 0}):
        for count in (5, 8):
            model(x, selection(count)).sum().backward()
    assert sizes == [5, 8]


def test_smaller_batches_are_none_of_that() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    with reweight(model, lambda layer, grads: torch.ones(grads.batch_size)):
        for batch in (5, 3, 1, 8):
            model(torch.randn(batch, 4)).sum().backward()
