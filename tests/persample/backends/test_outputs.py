"""The `outputs` backend on models drawn at random, in half precision, and made in odd ways."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from convnet import batch, cross_entropy, network
from hypothesis import given, settings
from oracle import loop_grads, rel_err
from strategies import Example, layers, models
from torch import Tensor, nn

import persample


def compare(example: Example) -> None:
    """Gradients and norms of a drawn model against the loop."""
    model, loss_fn, inputs, targets = example.build()
    expected = loop_grads(model, loss_fn, inputs, targets)
    psg = persample.per_sample(model, loss_fn, inputs, targets)
    largest = max((float(rows.abs().max()) for rows in expected.values() if rows.numel()), default=0.0)
    for name, rows in psg.grads().items():
        assert rel_err(rows, expected[name]) < 1e-8 or float((rows - expected[name]).abs().max()) < 1e-13 * largest
    squares = sum(rows.flatten(1).square().sum(1) for rows in expected.values() if rows.shape[0])
    if psg.batch and expected:
        torch.testing.assert_close(psg.norms(), squares.sqrt(), rtol=1e-8, atol=1e-12 * max(largest, 1.0))


@given(layers())
def test_random_layers(example: Example) -> None:
    compare(example)


@given(models())
def test_random_models(example: Example) -> None:
    compare(example)


@pytest.mark.slow
@settings(max_examples=1000)
@given(models(empty=True))
def test_a_thousand_random_models(example: Example) -> None:
    compare(example)


class Autocast(nn.Module):
    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.model(x)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("cast", ["autocast", "model"])
def test_half_precision_gives_float32(dtype: torch.dtype, tolerance: float, cast: str) -> None:
    model, (x, y) = network(), batch()
    exact = loop_grads(model.double(), cross_entropy, x.double(), y)
    low = Autocast(model.float(), dtype) if cast == "autocast" else model.to(dtype)
    psg = persample.per_sample(low, cross_entropy, x if cast == "autocast" else x.to(dtype), y)
    results = {name.removeprefix("model."): rows for name, rows in psg.grads().items()}
    for name, rows in exact.items():
        assert results[name].dtype == torch.float32
        assert rel_err(results[name].double(), rows) < tolerance
    assert psg.norms().dtype == psg.gram().dtype == psg.clipped_sum(1.0).popitem()[1].dtype == torch.float32


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.torch.jit:FutureWarning")  # and still used
@pytest.mark.parametrize("wrap", [torch.jit.script, torch.fx.symbolic_trace])
def test_scripted_and_traced_models(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    expected = loop_grads(model, lambda out, _: out.square().sum(1), x, None)
    for name, rows in persample.per_sample(wrap(model), lambda out, _: out.square().sum(1), x).grads().items():
        torch.testing.assert_close(rows, expected[name])


def test_more_samples_than_one_probe_tells_apart() -> None:
    """70 samples, routed to experts by the data: two digits to spell, asked again for each batch."""
    model, generator = nn.ModuleList([nn.Linear(4, 3) for _ in range(3)]).double(), torch.Generator().manual_seed(0)

    def routed(x: Tensor) -> Tensor:
        chosen = x.sum(1).mul(7).long() % 3
        out = x.new_zeros(len(x), 3)
        for number, expert in enumerate(model):
            where = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, where, expert(x[where]))
        return out

    model.forward = routed
    for _ in range(3):
        x = torch.randn(70, 4, generator=generator, dtype=torch.float64)
        expected = loop_grads(model, lambda out, _: out.square().sum(1), x, None)
        found = persample.per_sample(model, lambda out, _: out.square().sum(1), x).grads()
        for name, rows in expected.items():
            torch.testing.assert_close(found[name], rows)


def test_inside_no_grad_and_inference_mode() -> None:
    model, (x, y) = network(), batch()
    expected = persample.per_sample(model, cross_entropy, x, y).norms()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(persample.per_sample(model, cross_entropy, x, y).norms(), expected)


def test_automatic_choice_says_what_it_took() -> None:
    model, (x, y) = network(), batch()
    psg = persample.per_sample(model, cross_entropy, x, y, backend="auto")
    assert psg.backend == "outputs"
    with pytest.raises(persample.CoupledSamplesError):
        persample.per_sample(nn.BatchNorm1d(3), lambda out, _: out.sum(1), torch.randn(4, 3), backend="auto")


def test_buffers_are_reused() -> None:
    model, (x, y) = network(), batch()
    psg = persample.per_sample(model, cross_entropy, x, y)
    first = psg.grads()
    kept = {name: rows.clone() for name, rows in first.items()}
    again = psg.grads(out=first)
    for name, rows in again.items():
        assert rows.data_ptr() == first[name].data_ptr()
        torch.testing.assert_close(rows, kept[name])
    with pytest.raises(ValueError, match=r"out\['0.weight'\] must be"):
        psg.grads(out={"0.weight": torch.empty(2)})


def test_uses_over_time_are_one_block() -> None:
    """A recurrent weight and bias, used at every step, are held and explained as one block each."""
    model = nn.GRU(3, 4).double()
    psg = persample.per_sample(model, lambda out, _: out[0].sum((0, 2)), torch.randn(5, 2, 3).double())
    assert {name: len(blocks) for name, blocks in psg.blocks.items()} == dict.fromkeys(psg.blocks, 1)
    assert any("× 5" in row.operation for row in psg.explain())


def test_notes_say_when_every_batch_is_probed() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    assert not persample.per_sample(model, lambda out, _: out.sum(1), x).notes
    assert not persample.per_sample(model, lambda out, _: out[out.sum(1).argsort()].sum(1), x).notes
    unknown = persample.per_sample(model, lambda out, _: out.renorm(2, 0, 1e-3).sum(1), x)
    assert "probed" in unknown.notes[0]
