"""Chunks of the batch give what the whole gives, or are refused."""

from __future__ import annotations

import pytest
import torch
from oracle import rel_err
from torch import Tensor, nn

import persample
from persample.testing.cases import find


@pytest.mark.parametrize("name", ["language/gpt2", "vision/vit"])
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_chunks_equal_the_whole(name: str, chunk_size: int) -> None:
    model, loss_fn, inputs, targets = find(name).build()
    whole = persample.per_sample(model, loss_fn, inputs, targets)
    chunked = persample.per_sample(model, loss_fn, inputs, targets, chunk_size=chunk_size)
    c = torch.randn(whole.batch).double()
    v = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}
    for one, other in (
        (whole.losses, chunked.losses),
        (whole.grads(), chunked.grads()),
        (whole.norms("layer"), chunked.norms("layer")),
        (whole.gram(), chunked.gram()),
        (whole.gram("param", other=whole), chunked.gram("param", other=whole)),
        (whole.weighted_sum(c), chunked.weighted_sum(c)),
        (whole.dot(v), chunked.dot(v)),
        (whole.dot(whole.grads()), chunked.dot(whole.grads())),
        (whole.clipped_sum(0.1), chunked.clipped_sum(0.1)),
        (whole.sum_of_squares(), chunked.sum_of_squares()),
        (whole.variance(), chunked.variance()),
    ):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def test_chunks_replay_dropout() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 2)).double()
    psg = persample.per_sample(model, lambda out, _: out.square().sum(1), torch.randn(6, 4).double(), chunk_size=4)
    torch.testing.assert_close(psg.norms().square(), psg.gram().diagonal())
    torch.testing.assert_close(psg.norms(), psg.norms())


def test_chunks_of_something_else_are_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="the batch must lie there"):
        persample.per_sample(model, lambda out, _: out.sum((0, 2)), torch.randn(6, 5, 3), chunk_size=4)
    with pytest.raises(ValueError, match="positive number of samples"):
        persample.per_sample(model, lambda out, _: out.sum(1), torch.randn(6, 3), chunk_size=0)


def test_chunks_do_not_mix_with_rows() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        persample.per_sample(
            nn.BatchNorm1d(3), lambda out, _: out.sum(1), torch.randn(6, 3), coupled="rows", chunk_size=2
        )


def test_lists_of_what_each_sample_has_are_cut() -> None:
    """Labels of detectors: a dict for each image, of as many boxes as it has, be it as many as there are images."""
    model, x = nn.Linear(4, 2).double(), torch.randn(3, 4, dtype=torch.float64)
    targets = [{"boxes": torch.randn(n, 2, dtype=torch.float64), "name": str(n)} for n in (2, 3, 1)]

    def loss_fn(outputs: Tensor, targets: list) -> Tensor:
        return torch.stack([(y - t["boxes"]).square().sum() for y, t in zip(outputs, targets, strict=True)])

    whole = persample.per_sample(model, loss_fn, x, targets).grads()
    assert rel_err(persample.per_sample(model, loss_fn, x, targets, chunk_size=2).grads(), whole) < 1e-12


class Centred(nn.Module):
    """Two views of each sample, and what is left of their difference; or of that from the batch's mean."""

    def __init__(self, *, by_batch: bool) -> None:
        super().__init__()
        self.layer, self.by_batch = nn.Linear(32, 8), by_batch

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x - x.mean(0) if self.by_batch else x)
        return y[:, 0] - y[:, 1]


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_losses_that_are_left_of_large_numbers_are_rounded_in_each_chunk(offset: float) -> None:
    """A chunk's losses need not be the whole's to more than the inputs' rounding makes of them."""
    for seed in range(5):
        torch.manual_seed(seed)
        x = offset * torch.randn(4, 1, 32) + torch.randn(4, 2, 32)
        model = Centred(by_batch=False)
        norms = persample.per_sample(model, lambda y, _: y.sum(1), x, chunk_size=1).norms()
        torch.testing.assert_close(norms, persample.per_sample(model, lambda y, _: y.sum(1), x).norms())
        model = Centred(by_batch=True)
        with pytest.raises(persample.CheckError, match="have other losses in a chunk"):
            persample.per_sample(model, lambda y, _: y.square().sum(1), x, chunk_size=2)
