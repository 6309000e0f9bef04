"""Operations that could mislead a plan: each model is asked again with other data, twice over.

Where samples lie may follow from data (an argsort, a branch, a mask) although the graph looks the same, or an
operation may mix samples in one of its dimensions only. Rows must be the loop's, or the samples be refused.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import loop_grads, rel_err
from torch import Tensor, nn

import persample

B, T, D, OUT = 4, 4, 5, 3


class Wrapped(nn.Module):
    """A linear layer, then `after(y, x)`; T = B, so that no shape tells samples from positions."""

    def __init__(self, after: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.after = nn.Linear(D, OUT).double(), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.linear(x), x)


def loss(outputs: Tensor, targets: None) -> Tensor:
    """One loss for each row of dimension 0."""
    return (outputs.flatten(1) + 0.3).square().sum(1)


def positive(x: Tensor) -> bool:
    """A branch that depends on data."""
    return bool(x[0, 0, 0] > 0)


def order(x: Tensor) -> Tensor:
    """A permutation of the samples that depends on data."""
    return x[:, 0, 0].argsort()


def zeros() -> Tensor:
    return torch.zeros(B, T, OUT, dtype=torch.float64)


def cubes(y: Tensor) -> Tensor:
    """[B, T, OUT] -> [B, T, B]."""
    return torch.cat([y, y[..., :1]], 2)


def over_samples(y: Tensor) -> Tensor:
    """Attention whose positions are the samples, [1, T, B, D] -> [B, T, D]."""
    return F.scaled_dot_product_attention(y, y, y)[0].transpose(0, 1)


REORDERED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda y, x: y[order(x)],
    "index_select": lambda y, x: y.index_select(0, order(x)),
    "index_put": lambda y, x: zeros().index_put((order(x),), y),
    "index_add": lambda y, x: zeros().index_add(0, order(x), y),
    "index_copy": lambda y, x: zeros().index_copy(0, order(x), y),
    "scatter": lambda y, x: zeros().scatter(0, order(x)[:, None, None].expand(B, T, OUT), y),
    "gather": lambda y, x: y.gather(0, order(x)[:, None, None].expand(B, T, OUT)),
    "take": lambda y, x: y.take(torch.arange(B * T * OUT).view(B, T, OUT)[order(x)]),
    "masked_scatter": lambda y, x: zeros().masked_scatter(torch.ones(B, T, OUT, dtype=torch.bool), y[order(x)]),
    "stack of selected": lambda y, x: torch.stack([y[int(i)] for i in order(x)]),
    "stack of unbound": lambda y, x: torch.stack([y.unbind(0)[i] for i in order(x)]),
    "matrix from the left": lambda y, x: torch.einsum("ab,btd->atd", torch.eye(B).double()[order(x)], y),
    "matrix from the right": lambda y, x: (y.sum(1).T @ torch.eye(B).double()[order(x)]).T,
    "sorted over samples": lambda y, x: y.sort(0).values,
    "roll": lambda y, x: y.roll(int(positive(x)), 0),
    "flip": lambda y, x: y.flip(0) if positive(x) else y.flip(1),
    "rot90": lambda y, x: torch.rot90(y, 2 * int(positive(x)), (0, 1)),
    "cat of slices": lambda y, x: torch.cat([y[:2], y[2:]] if positive(x) else [y[2:], y[:2]]),
    "roll of all entries": lambda y, x: y.roll(0 if positive(x) else y[0].numel()),
    "cat of splits": lambda y, x: torch.cat(y.split(2)[:: -1 if positive(x) else 1]),
    "transpose or none": lambda y, x: y.transpose(0, 1) if positive(x) else y.transpose(1, 1),
    "permute": lambda y, x: y.permute(0, 1, 2) if positive(x) else y.permute(1, 0, 2),
    "stack along either axis": lambda y, x: torch.stack(y.unbind(0), int(positive(x))),
    "unbind along either axis": lambda y, x: torch.stack(y.unbind(int(positive(x)))),
    "unfold along either axis": lambda y, x: y.unfold(int(positive(x)), 1, 1),
    "diagonal of either pair": lambda y, x: cubes(y).diagonal(0, int(positive(x)), 2),
    "prod along either axis": lambda y, x: cubes(y).prod(int(positive(x))),
    "kthvalue along either axis": lambda y, x: cubes(y).kthvalue(2, int(positive(x))).values,
    "index_fill along either axis": lambda y, x: y.index_fill(int(positive(x)), torch.tensor([1]), 0.0),
    "slice_scatter along either axis": lambda y, x: torch.slice_scatter(y, y.flip(0), int(positive(x)), 0, B),
    "as_strided": lambda y, x: y.as_strided((B, T, OUT), (12, 3, 1) if positive(x) else (3, 12, 1)),
    "where": lambda y, x: torch.where(x[0, 0, 0] > 0, y, y.transpose(0, 1)),
    "product with 0 or 1": lambda y, x: y * (x[0, 0, 0] > 0) + y.transpose(0, 1) * (x[0, 0, 0] <= 0),
}
APART: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cumsum": lambda y, x: y.cumsum(1),
    "cummax": lambda y, x: y.cummax(1).values,
    "logcumsumexp": lambda y, x: y.logcumsumexp(-1),
    "median": lambda y, x: y.median(1).values,
    "kthvalue": lambda y, x: y.kthvalue(2, 1).values,
    "topk": lambda y, x: y.topk(2, 1).values,
    "take_along_dim": lambda y, x: torch.take_along_dim(y, x[:, :, :1].argsort(1), 1),
    "prod": lambda y, x: y.prod(1),
    "std": lambda y, x: y.std((1, 2), keepdim=True),
    "cdist": lambda y, x: torch.cdist(y, y + 1),
    "fft": lambda y, x: torch.fft.fft(y, dim=1).abs(),
    "unfold": lambda y, x: y.unfold(1, 2, 1),
    "fold": lambda y, x: F.fold(F.unfold(y[:, None], 2), (T, OUT), 2),
    "diagonal": lambda y, x: y.diagonal(0, 1, 2),
    "tril": lambda y, x: y.tril(),
    "repeat": lambda y, x: y.repeat(1, 2, 1),
    "repeat_interleave": lambda y, x: y.repeat_interleave(2, 0)[::2],
    "tile and slice": lambda y, x: y.repeat(2, 1, 1)[B : 2 * B],
    "pad of samples": lambda y, x: F.pad(y, (0, 0, 0, 0, 1, 0))[1:],
    "circular pad": lambda y, x: F.pad(y, (1, 1), mode="circular"),
    "complex": lambda y, x: torch.view_as_real(torch.complex(y, 2 * y) ** 2),
    "normalize": lambda y, x: F.normalize(y, dim=-1) + 0.1 * y,
    "layer norm of two axes": lambda y, x: F.layer_norm(y, (T, OUT)) * y,
    "instance norm": lambda y, x: F.instance_norm(y),
    "attention": lambda y, x: F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None]),
    "heads are samples": lambda y, x: F.scaled_dot_product_attention(y[None], y[None], y[None], is_causal=True)[0],
    "renorm": lambda y, x: y.renorm(2, 0, 1.0),
    "matrix_exp": lambda y, x: torch.matrix_exp(y[:, :2, :2]),
    "solve": lambda y, x: torch.linalg.solve(y[:, :2, :2], y[:, 2:, :2]),
    "transposed layer": lambda y, x: F.linear(y.transpose(0, 1), torch.ones(3, 3).double()).transpose(0, 1),
}
MIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cumsum over samples": lambda y, x: y.cumsum(0),
    "softmax over samples": lambda y, x: y.softmax(0),
    "layer norm of all": lambda y, x: F.layer_norm(y, (B, T, OUT)),
    "batch norm": lambda y, x: F.batch_norm(y, None, None, training=True),
    "attention over samples": lambda y, x: over_samples(y.transpose(0, 1)[None]),
    "sum over samples by einsum": lambda y, x: torch.einsum("bti,sti->bs", y, y),
    "minus the mean": lambda y, x: (y - y.mean(0)).tanh(),
}


SOMETIMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cummax": lambda y, x: y.cummax(int(positive(x))).values,
    "fft": lambda y, x: torch.fft.fft(y, dim=int(positive(x))).abs(),
    "softmax": lambda y, x: y.softmax(int(positive(x))),
    "logcumsumexp": lambda y, x: y.logcumsumexp(int(positive(x))),
}


def batches() -> list[Tensor]:
    """Other data for the same graph, each batch also with its samples and its positions turned round."""
    random = torch.Generator().manual_seed(0)
    drawn = [torch.randn(B, T, D, dtype=torch.float64, generator=random) for _ in range(3)]
    return [y for x in drawn for y in (x, x.flip(0), x.roll(1, 1), -x)]


@pytest.mark.parametrize("name", [*REORDERED, *APART])
def test_rows_are_the_loops_in_every_batch(name: str) -> None:
    model = Wrapped({**REORDERED, **APART}[name])
    for x in batches():
        got = persample.per_sample(model, loss, x).grads()
        assert rel_err(got, loop_grads(model, loss, x, None)) < 1e-8


@pytest.mark.parametrize("name", SOMETIMES)
def test_samples_that_mix_in_some_batches_are_refused_there(name: str) -> None:
    """In a graph of the same shapes: along which axis an operation goes depends on the data."""
    model = Wrapped(SOMETIMES[name])
    for x in batches():
        if positive(x):
            assert rel_err(persample.per_sample(model, loss, x).grads(), loop_grads(model, loss, x, None)) < 1e-8
        else:
            with pytest.raises(persample.CoupledSamplesError):
                persample.per_sample(model, loss, x)


@pytest.mark.parametrize("name", MIXED)
def test_mixed_samples_are_refused_in_every_batch(name: str) -> None:
    model = Wrapped(MIXED[name])
    for x in batches()[:4]:
        with pytest.raises(persample.CoupledSamplesError):
            persample.per_sample(model, loss, x)
