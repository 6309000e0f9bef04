"""Operations that could mislead a plan: each model is asked again with other data, twice over.

Where samples lie may follow from data (an argsort, a branch, a mask) although the graph looks the same, or an
operation may mix samples in one of its dimensions only. Rows must be the loop's, or the samples be refused.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

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


@dataclass
class Pair:
    """Inputs in a class that pytrees do not know."""

    x: Tensor
    scale: Tensor


class Centred(torch.autograd.Function):
    """x Wᵀ minus its mean over the batch: its weight has rows, and each of them depends on every sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x @ weight.T) - (x @ weight.T).mean(0)

    @staticmethod
    def backward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        z = z - z.mean(0)
        return z @ weight, z.T @ x


def centred(h: Tensor, dim: int = 0) -> Tensor:
    """Couples the samples along a dimension."""
    return (h - h.mean(dim, keepdim=True)).tanh()


def in_a_thread(function: Callable[[], Tensor]) -> Tensor:
    """Where no mode of the calling thread sees what happens."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function).result()


class Apart(nn.Module):
    """Two linear layers in a function of the model and its inputs."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D).double(), nn.Linear(D, OUT).double()
        self.run = run

    def forward(self, *inputs: Any) -> Tensor:
        return self.run(self, *inputs)


SAMPLES, SCALE = torch.randn(B, D, dtype=torch.float64), torch.rand(B, 1, dtype=torch.float64)
FRAMES, BAGS = torch.randn(7, B, D, dtype=torch.float64), torch.tensor([0, 0, 1, 2, 2, 2, 3])
POINTS = torch.randn(7, D, dtype=torch.float64)
UNSEEN: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "time first beside lengths": (
        lambda m, x, scale: m.second(centred(m.first(x), 1).sum(0) * scale),
        (FRAMES, SCALE),
    ),
    "attention over all nodes beside features of graphs": (
        lambda m, x, bag, scale: m.second(
            zeros()[:, 0, :1].expand(B, D).index_add(0, bag, m.first(x) * m.first(x)[:, :1].softmax(0)) * scale
        ),
        (POINTS, BAGS, SCALE),
    ),
    "a dataclass": (lambda m, pair: m.second(centred(m.first(pair.x))), (Pair(SAMPLES, SCALE),)),
    "an array": (lambda m, x: m.second(centred(m.first(torch.as_tensor(x)))), (SAMPLES.numpy(),)),
    "a list inside": (
        lambda m, x: m.second(centred(m.first(torch.tensor(x.tolist(), dtype=x.dtype)))),
        SAMPLES,
    ),
    "another thread": (lambda m, x: m.second(in_a_thread(lambda: centred(m.first(x)))), SAMPLES),
    "no inputs": (lambda m: m.second(centred(m.first(SAMPLES))), ()),
    "a sparse matrix": (lambda m, x: m.second(centred(torch.sparse.mm(x, m.first.weight))), SAMPLES.to_sparse()),
    "a custom function": (lambda m, x: m.second(Centred.apply(m.first(x), m.first.weight).tanh()), SAMPLES),
    "a custom function on data": (lambda m, x: m.second(Centred.apply(x, m.first.weight).tanh()), SAMPLES),
}
SHARED: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "a grid": (lambda m, x, grid: m.second(x) @ m.second(m.first(grid).tanh()).T, (SAMPLES, POINTS)),
    "a grid as long as the batch": (
        lambda m, x, grid: m.second(x) @ m.second(m.first(grid[0]).tanh()).T,
        (SAMPLES, POINTS[None, :B]),
    ),
    "descriptions of classes, as long as the batch": (
        lambda m, x, words: m.second(x) @ m.second(m.first(words)).mean(1).T,
        (SAMPLES, FRAMES),
    ),
    "time first, and steps that all samples share": (
        lambda m, x, step: m.second((x + m.first(step)[:, None]).cumsum(0)).transpose(0, 1),
        (FRAMES, POINTS),
    ),
    "constants of the model": (
        lambda m, x: m.second(m.first(x) + m.first(torch.tensor(POINTS[:1].tolist(), dtype=x.dtype)).softmax(-1)),
        SAMPLES,
    ),
    "bags": (
        lambda m, x, bag, scale: m.second(
            zeros()[:, 0, :1].expand(B, D).index_add(0, bag, m.first(x).exp() * m.first(x)[:, :1].sigmoid()) * scale
        ),
        (POINTS, BAGS, SCALE),
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_mixed_samples_are_refused_however_data_came_in(name: str) -> None:
    run, inputs = UNSEEN[name]
    with pytest.raises(persample.CoupledSamplesError):
        persample.per_sample(Apart(run), loss, inputs)


@pytest.mark.parametrize("name", SHARED)
def test_what_all_samples_share_mixes_none(name: str) -> None:
    run, inputs = SHARED[name]
    model = Apart(run)
    for _ in range(3):
        assert rel_err(persample.per_sample(model, loss, inputs).grads(), loop_grads(model, loss, inputs, None)) < 1e-8


def test_the_refusal_of_a_shared_input_says_how_to_share_it() -> None:
    run, (x, grid) = SHARED["a grid"]
    with pytest.raises(persample.CoupledSamplesError, match=r"of shape \(4, 5\) holds no samples .* \(1, 4, 5\)"):
        persample.per_sample(Apart(run), loss, (x, grid[:B]))


def test_a_plan_knows_parameters_by_name() -> None:
    model = Apart(lambda m, x: m.pair[1](m.pair[0](x).tanh()))
    model.second = nn.Linear(D, D).double()
    object.__setattr__(model, "pair", (model.first, model.second))
    for _ in range(2):
        assert (
            rel_err(persample.per_sample(model, loss, SAMPLES).grads(), loop_grads(model, loss, SAMPLES, None)) < 1e-8
        )
        model.first, model.second = model.second, model.first


class Scaled(torch.autograd.Function):
    """s x Wᵀ, the arguments that are no tensors first."""

    @staticmethod
    def forward(ctx: Any, scale: float, name: str, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        return scale * x @ weight.T

    @staticmethod
    def backward(ctx: Any, z: Tensor) -> tuple[None, None, Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        return None, None, ctx.scale * z @ weight if ctx.needs_input_grad[2] else None, ctx.scale * z.T @ x


@pytest.mark.parametrize("inner", [False, True])
def test_arguments_that_are_no_tensors(inner: bool) -> None:
    model = Apart(lambda m, x: m.second(Scaled.apply(2.0, "name", m.first(x) if inner else x, m.first.weight).tanh()))
    got = persample.per_sample(model, loss, SAMPLES).grads()
    assert rel_err(got, loop_grads(model, loss, SAMPLES, None)) < 1e-8


def padded(m: Apart, x: Tensor, lengths: Tensor) -> Tensor:
    """Sequences cut to the longest of the batch, as unpacking does; padding has a loss as well."""
    longest = int(lengths.max())
    return m.second(m.first(x[:, :longest]) * (torch.arange(longest) < lengths[:, None])[..., None])


WHOLE: dict[str, tuple[Callable[..., Tensor], Any, type[Exception], str]] = {
    "a shared tensor of B entries": (
        lambda m, x, shared: m.second(m.first(x) + shared),
        (FRAMES.transpose(0, 1)[:, :B], SAMPLES),
        persample.CheckError,
        "other losses",
    ),
    "padding to the longest": (
        padded,
        (FRAMES.transpose(0, 1), torch.tensor([2, 1, 7, 3])),
        persample.CheckError,
        "other losses",
    ),
    "time first": (lambda m, x: m.second(m.first(x)).sum(0), FRAMES, ValueError, "the batch must lie there"),
    "a size that is fixed": (
        lambda m, x: m.second(m.first(x)).reshape(B, OUT),
        SAMPLES,
        ValueError,
        "not on a part of it",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_batches_that_cannot_be_cut(name: str) -> None:
    run, inputs, error, message = WHOLE[name]
    with pytest.raises(error, match=message):
        persample.per_sample(Apart(run), loss, inputs, chunk_size=1).norms()


def test_lazy_modules_that_were_never_called() -> None:
    model = nn.Sequential(nn.LazyLinear(OUT), nn.Tanh(), nn.LazyLinear(2)).double()
    got = persample.per_sample(model, loss, SAMPLES).grads()
    assert rel_err(got, loop_grads(model, loss, SAMPLES, None)) < 1e-8


@pytest.mark.parametrize(
    ("layers", "where"),
    [
        ((nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4)), "in layer '2'"),
        ((nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Softmax(0)), "in layer '2'"),
    ],
    ids=["twice", "and a softmax"],
)
def test_batch_norm_below_what_couples_samples_again(layers: tuple[nn.Module, ...], where: str) -> None:
    """The first parameter met is that of a batch normalisation, and its rows cannot be told apart."""
    with pytest.raises(persample.CoupledSamplesError, match=where):
        persample.per_sample(nn.Sequential(*layers), lambda out, _: out.square().sum(1), torch.randn(5, 4))
