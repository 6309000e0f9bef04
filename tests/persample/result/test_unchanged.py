"""Reductions that use parameters again notice that these are others."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import loop_grads, norms, rel_err
from torch import Tensor, nn

import persample
from persample.blocks.types import Outer
from persample.capture.types import Captured
from persample.result.holding import factors, unchanged
from persample.result.holding.unchanged import bits

pytestmark = pytest.mark.usefixtures("double")


def squares(y: Tensor, _: Any) -> Tensor:
    return y.square().flatten(1).sum(1)


def model_of() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def by_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.0001)


def by_step(model: nn.Module, **options: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.Adam(model.parameters(), 1e-6, **options).step()


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "data": by_data,
    "step": by_step,
    "fused": lambda model: by_step(model, fused=True),
}


@pytest.mark.parametrize("options", [{"hold": "graph"}, {"chunk_size": 2}, {"chunk_size": 2, "check": False}])
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_have_changed_are_an_error(change: str, options: dict[str, Any]) -> None:
    model, x = model_of(), torch.randn(5, 3)
    found = persample.per_sample(model, squares, x, **options)
    found.norms()
    CHANGES[change](model)
    with pytest.raises(RuntimeError, match=r"parameters or buffers of the model .* before the optimizer's step"):
        found.grads()


def test_factors_are_as_they_were() -> None:
    model, x = model_of(), torch.randn(5, 3)
    expected = loop_grads(model, squares, x, None)
    found = persample.per_sample(model, squares, x)
    by_step(model, fused=True)
    for name, rows in found.grads().items():
        torch.testing.assert_close(rows, expected[name])


def test_inputs_of_chunks_that_have_changed_are_an_error() -> None:
    x = torch.randn(5, 3)
    found = persample.per_sample(model_of(), squares, x, chunk_size=2)
    x.mul_(1 + 1e-12)
    with pytest.raises(RuntimeError, match="a tensor of the inputs or targets was modified in place"):
        found.norms()


def test_tables_that_a_model_normalises_itself_are_no_change() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 2))
    x = torch.arange(8).view(4, 2)
    found = persample.per_sample(model, squares, x, chunk_size=2)
    rows = found.grads()
    expected = loop_grads(model, squares, x, None)
    for name, each in found.grads().items():
        torch.testing.assert_close(each, expected[name])
        torch.testing.assert_close(rows[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.complex64])
def test_sums_of_bits_are_of_values(dtype: torch.dtype) -> None:
    values = torch.randn(4, 6, dtype=torch.float32).to(dtype)
    for part in (values, values.T, values[:, 1:], values[0, 1:], values[0, 0]):
        before = bits(part)
        assert torch.equal(before, bits(part))
        part.mul_(2)
        assert not torch.equal(before, bits(part))
    assert bits(values[:0]) == 0


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.randoms(use_true_random=False), st.booleans())
def test_sums_of_bits_are_of_places(shape: list[int], random: Random, turned: bool) -> None:
    """A permutation of the entries is noticed, and a change of the memory format is none."""
    values = torch.arange(float(prod(shape))).reshape(shape)
    values = values.transpose(0, -1) if turned else values
    before, numbers = bits(values), values.flatten().tolist()
    random.shuffle(numbers)
    after = bits(torch.empty_like(values).copy_(torch.tensor(numbers).reshape(values.shape)))
    assert torch.equal(before, after) == (numbers == values.flatten().tolist())


# --- data that are written to without a version --------------------------------------------------------------------


class Masked(nn.Module):
    """A layer on the input, one on a table, a mask on a weight, statistics of another network: all read again."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("mask", torch.ones(4, 4))
        self.norm = nn.BatchNorm1d(4).eval()

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.inner.weight * self.mask) + self.table(words).mean(1)
        return self.head(self.norm(hidden).tanh())


def weighed(y: Tensor, t: Tensor) -> Tensor:
    return t * y.square().sum(1)


def of_numpy(*arrays: np.ndarray) -> tuple[Tensor, ...]:
    return tuple(map(torch.from_numpy, arrays))


WHERE = ("x", "words", "targets", "mask", "statistics")


@pytest.mark.parametrize("how", ["numpy", "data", "in place", "reversed"])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    "options",
    [{}, {"hold": "graph"}, {"chunk_size": 2}, {"chunk_size": 2, "hold": "graph"}, {"backend": "hooks"},
     {"backend": "vmap"}],
    ids=str,
)  # fmt: skip
def test_what_was_captured_stays_or_the_change_is_told(options: dict[str, Any], where: str, how: str) -> None:
    random = np.random.default_rng(0)
    arrays = random.normal(size=(5, 4)), random.integers(0, 9, (5, 3)), random.uniform(0.5, 2, 5)
    x, words, targets = of_numpy(*arrays)
    model = Masked()
    mask = np.eye(4) + 0.5
    if "backend" in options:
        model.forward = lambda x, words: model.head(model.inner(x) + model.table(words).mean(1))  # type: ignore
        if where in ("mask", "statistics"):
            return
    model.mask = torch.from_numpy(mask)
    expected = loop_grads(model, weighed, (x.clone(), words.clone()), targets.clone())
    found = persample.per_sample(model, weighed, (x, words), targets, **options)
    tensor = {"x": x, "words": words, "targets": targets, "mask": model.mask, "statistics": model.norm.running_var}[
        where
    ]
    if how == "numpy":
        array = tensor.numpy()
        array[:] = array[::-1] + (tensor.ndim == 1)
    elif how == "data":
        tensor.data.copy_(tensor.flip(0))
        tensor.data[0] = 2
    elif how == "in place":
        tensor.copy_(tensor.flip(0))[0] = 2
    else:
        tensor.numpy()[:] = np.ascontiguousarray(tensor.numpy()[..., ::-1])
    for name, want in (("grads", expected), ("norms", norms(expected))):
        try:
            got = getattr(found, name)()
        except RuntimeError as error:
            got = str(error)
        assert "modified" in got if isinstance(got, str) else rel_err(got, want) < 1e-12


def test_a_batch_in_anothers_place_is_told_by_the_other_of_a_gram_matrix() -> None:
    model, x = model_of(), torch.randn(5, 3)
    first = persample.per_sample(model, squares, x, hold="graph")
    second = persample.per_sample(model, squares, x.clone())
    x.data.zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        second.gram(other=first)


def test_a_loader_that_refills_its_buffer_between_two_batches() -> None:
    model, buffer = nn.Linear(4, 3), np.zeros((5, 4))
    for seed in range(3):
        buffer[:] = np.random.default_rng(seed).normal(size=(5, 4))
        x = torch.from_numpy(buffer)
        found = persample.per_sample(model, squares, x)
        for name, rows in loop_grads(model, squares, x, None).items():
            torch.testing.assert_close(found.grads()[name], rows)


def test_activations_are_not_read_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are over what is read again, data and parameters, and where factors are held over nothing."""
    read = []
    original = unchanged.bits
    monkeypatch.setattr(unchanged, "bits", lambda each: (read.append(each.nbytes), original(each))[1])
    model, x = model_of(), torch.randn(5, 3)
    persample.per_sample(model, squares, x).norms()
    assert not read
    persample.per_sample(model, squares, x, hold="graph").norms()
    once = [x.nbytes, *(each.nbytes for each in model.parameters())]
    assert sum(read) <= 2 * sum(once)


def test_factors_in_the_callers_memory_are_copies() -> None:
    x = torch.randn(4, 1, 3)
    use = Captured(Outer(x, torch.randn(4, 1, 2)), "Addmm", "addmm")
    uses = {"a": (use,), "b": (use,)}
    assert factors.owned(uses, frozenset())["a"][0] is use
    copied = factors.owned(uses, unchanged.addresses([x]))
    assert copied["a"][0].block.x is copied["b"][0].block.x is not x
    assert copied["a"][0].block.z is use.block.z


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (4096,), (300, 64), (5000, 4)])
def test_sums_of_bits_are_of_signs(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """All signs, those of an entry in each row and those of a block with an even number of rows and columns."""
    values = torch.randn(shape).to(dtype)
    before = bits(values)
    for part in (values, values[..., -1:], values[:2], values[-1:]):
        part.data.neg_()
        assert not torch.equal(before, bits(values))
        part.data.neg_()
        assert torch.equal(before, bits(values))


def test_sums_of_bits_are_those_of_other_devices() -> None:
    """The product of rows and factors is a sum of products, in the same integers."""
    rows = torch.randint(-(2**31), 2**31 - 1, (5000, 64), dtype=torch.int32)
    factors = unchanged._factors(rows.device, rows.dtype).repeat(2)[:5000]
    assert torch.equal(unchanged._weighted(rows), (rows * factors[:, None]).sum(0, dtype=torch.int32))
