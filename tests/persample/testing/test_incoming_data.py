"""How data come into a model, unseen, shared or not to be cut: rows are the loop's, or the samples are refused."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import loop_grads, rel_err
from torch import Tensor, nn

import persample

B, D, OUT = 4, 5, 3


def loss(outputs: Tensor, targets: None) -> Tensor:
    """One loss for each row of dimension 0."""
    return (outputs.flatten(1) + 0.3).square().sum(1)


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
            torch.zeros(B, D, dtype=torch.float64).index_add(0, bag, m.first(x) * m.first(x)[:, :1].softmax(0)) * scale
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
            torch.zeros(B, D, dtype=torch.float64).index_add(0, bag, m.first(x).exp() * m.first(x)[:, :1].sigmoid())
            * scale
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
