"""The `outputs` backend where it is asked the most: coupling, precision, odd models, state, threads, chunks."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from oracle import clipped_sum, loop_grads, rel_err
from strategies import Example, layers, models
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

import persample
from persample.cases import find
from persample.rules import RULES


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.float() if outputs.dtype.itemsize < 4 else outputs, targets, reduction="none")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(8 * 36, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 6, 6), torch.randint(0, 5, (size,))


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


# --- samples that influence each other --------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_batch_normalisation_is_refused_by_name(affine: bool) -> None:
    model = nn.Sequential()
    model.add_module("first", nn.Linear(3, 4))
    model.add_module("norm", nn.BatchNorm1d(4, affine=affine))
    model.add_module("last", nn.Linear(4, 2))
    with pytest.raises(persample.CoupledSamplesError, match=r"in layer 'norm' \(operation NativeBatchNorm\).*eval"):
        persample.per_sample(model, lambda out, _: out.sum(1), torch.randn(5, 3))


def test_batch_normalisation_alone_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(persample.CoupledSamplesError, match="in layer '0'"):
        persample.per_sample(model, lambda out, _: out.square().sum(1), torch.randn(5, 3))
    persample.per_sample(model.eval(), lambda out, _: out.square().sum(1), torch.randn(5, 3))


def test_a_loss_normalised_over_the_batch_is_refused() -> None:
    with pytest.raises(persample.CoupledSamplesError, match=r"influence each other, in the loss \(operation"):
        persample.per_sample(nn.Linear(3, 2), lambda out, _: (out / out.norm()).sum(1), torch.randn(5, 3))


def test_rows_on_request_are_those_of_the_summed_loss() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3).double()
    psg = persample.per_sample(model, lambda out, _: out.square().sum(1), x, coupled="rows")
    hidden: list[Tensor] = []
    handle = model[0].register_forward_hook(lambda _module, _inputs, out: hidden.append(out))
    losses = model(x).square().sum(1)
    handle.remove()
    z = torch.autograd.grad(losses.sum(), hidden[0])[0]
    torch.testing.assert_close(psg.grads()["0.weight"], torch.einsum("bo,bi->boi", z, x))


def test_rows_need_the_batch_first() -> None:
    class TimeMajor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:  # [T, B, 3] -> [B, 4]
            return self.norm(self.lin(x.unflatten(1, (1, -1)).flatten(1, 2)).mean(0))

    with pytest.raises(persample.CoupledSamplesError, match="dimension 0 of its output is not the batch"):
        persample.per_sample(TimeMajor(), lambda out, _: out.square().sum(1), torch.randn(4, 5, 3), coupled="rows")


def test_losses_alone_give_the_rows_of_the_jacobian() -> None:
    """Nothing tells data from parameters there, so coupled losses have their Jacobian's rows."""
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3).double()
    losses = (model(x) / model(x).norm()).sum(1)
    rows = persample.grad(losses, model.parameters())
    for b in range(5):
        expected = torch.autograd.grad(losses[b], list(model.parameters()), retain_graph=True)
        for row, one in zip(rows, expected, strict=True):
            torch.testing.assert_close(row[b], one)


# --- never silently wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AddmmBackward0", "ConvolutionBackward0", "NativeLayerNormBackward0"])
def test_a_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Also where the model's plan had been made and checked with the right rule."""
    model, (x, y) = network(), batch()
    persample.per_sample(model, cross_entropy, x, y)
    right = RULES[kind]

    def wrong(site: object) -> object:
        block = right(site)  # type: ignore[arg-type]
        return type(block)(*(f * 1.01 if isinstance(f, Tensor) else f for f in vars(block).values()))

    monkeypatch.setitem(RULES, kind, wrong)
    with pytest.raises(persample.CheckError, match="do not add up to the batch gradient"):
        persample.per_sample(model, cross_entropy, x, y)
    persample.per_sample(model, cross_entropy, x, y, check=False)


def test_a_modified_input_is_noticed() -> None:
    model, (x, y) = network(), batch()
    psg = persample.per_sample(model, cross_entropy, x, y)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        psg.norms()


def test_rows_that_take_the_place_of_factors() -> None:
    """Norms form the rows of a convolution: where these are smaller, they are held from then on, and x no longer."""
    model, (x, y) = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(48, 5)).double(), batch()
    x = x.double()
    psg = persample.per_sample(model, cross_entropy, x, y)
    expected = loop_grads(model, cross_entropy, x, y)
    held = {use.parameter: use.block for use in psg.explain()}
    norms = psg.norms()
    assert (held["0.weight"], held["2.weight"]) == ("Conv", "Outer")
    assert {use.parameter: use.block for use in psg.explain()} == {**held, "0.weight": "Dense"}
    x.zero_()
    for name, rows in psg.grads().items():
        torch.testing.assert_close(rows, expected[name])
    torch.testing.assert_close(psg.norms(), norms)
    torch.testing.assert_close(psg.clipped_sum(0.1)["0.weight"], clipped_sum(expected, 0.1)["0.weight"])


def test_nan_stays_with_its_sample() -> None:
    model, (x, y) = network(), batch()
    x[2] = torch.nan
    norms = persample.per_sample(model, cross_entropy, x, y).norms()
    assert norms.isnan().tolist() == [False, False, True, False, False, False]


def test_tiny_gradients_keep_their_owner() -> None:
    """Losses over thirty orders of magnitude: no row is lost."""
    model, x = nn.Linear(4, 3).double(), torch.randn(6, 4).double()
    scale = torch.logspace(-25, 5, 6, dtype=torch.float64)
    psg = persample.per_sample(model, lambda out, s: s * out.square().sum(1), x, scale)
    expected = loop_grads(model, lambda out, s: s * out.square().sum(1), x, scale)
    torch.testing.assert_close(psg.grads()["weight"], expected["weight"], rtol=1e-12, atol=0)


# --- precision --------------------------------------------------------------------------------------------


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


# --- odd models -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is deprecated, and still used
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


# --- state ------------------------------------------------------------------------------------------------


def test_no_growth_and_nothing_left_behind() -> None:
    """200 calls: as many tensors alive after as before, no hook, no gradient, no mode."""
    model, (x, y) = network(), batch()

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(found), Tensor) for found in gc.get_objects())

    for _ in range(3):
        persample.per_sample(model, cross_entropy, x, y).norms()
    before = alive()
    for _ in range(200):
        persample.per_sample(model, cross_entropy, x, y).norms()
    assert alive() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_an_exception_in_the_loss_leaves_the_model_as_it_was() -> None:
    model, (x, y) = network(), batch()

    def broken(_outputs: Tensor, _targets: Tensor) -> Tensor:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        persample.per_sample(model, broken, x, y)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not _get_current_dispatch_mode_stack()
    assert torch.is_grad_enabled()


def test_results_hold_no_graph() -> None:
    model, (x, y) = network(), batch()
    psg = persample.per_sample(model, cross_entropy, x, y)
    results = [psg.losses, psg.norms(), psg.gram(), *psg.grads().values(), *psg.clipped_sum(1.0).values()]
    assert not any(result.requires_grad for result in results)
    assert not any(factor.requires_grad for blocks in psg.blocks.values() for b in blocks for factor in b.factors)


def test_several_threads() -> None:
    model, failures = network().double(), []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(5):
            x = torch.randn(6, 3, 6, 6, generator=generator, dtype=torch.float64)
            y = torch.randint(0, 5, (6,), generator=generator)
            found = persample.per_sample(model, cross_entropy, x, y).grads()
            expected = loop_grads(model, cross_entropy, x, y)
            failures.extend(n for n in expected if rel_err(found[n], expected[n]) > 1e-9)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- chunks, choice, buffers ------------------------------------------------------------------------------


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
        (whole.clipped_sum(0.1), chunked.clipped_sum(0.1)),
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


def test_chunks_do_not_mix_with_rows() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        persample.per_sample(
            nn.BatchNorm1d(3), lambda out, _: out.sum(1), torch.randn(6, 3), coupled="rows", chunk_size=2
        )


def test_uses_over_time_are_one_block() -> None:
    """A recurrent weight and bias, used at every step, are held and explained as one block each."""
    model = nn.GRU(3, 4).double()
    psg = persample.per_sample(model, lambda out, _: out[0].sum((0, 2)), torch.randn(5, 2, 3).double())
    assert {name: len(blocks) for name, blocks in psg.blocks.items()} == dict.fromkeys(psg.blocks, 1)
    assert any("× 5" in row.operation for row in psg.explain())


def test_notes_say_when_every_batch_is_probed() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    assert not persample.per_sample(model, lambda out, _: out.sum(1), x).notes
    sorted_rows = persample.per_sample(model, lambda out, _: out[out.sum(1).argsort()].sum(1), x)
    assert "probed" in sorted_rows.notes[0]


class WritesIntoItsGradient(torch.autograd.Function):
    """Identity whose backward doubles what it is given, in place: what a custom Function must not do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.mul_(2)


def test_a_backward_that_writes_into_a_held_gradient_gives_right_rows_or_none() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            # the sum hands the same gradient to its second linear layer, which holds it, and to the custom Function
            return self.second(h) + WritesIntoItsGradient.apply(h)

    model, x = Model().double(), torch.randn(4, 3, dtype=torch.float64)
    refused = 0
    for _ in range(3):  # the first batch is probed, later ones go by plan if there is one
        try:
            psg = persample.per_sample(model, lambda out, _: out.square().sum(1), x)
        except persample.CheckError:
            refused += 1
            continue
        expected = loop_grads(model, lambda out, _: out.square().sum(1), x, None)
        assert all(torch.allclose(psg.grads()[name], expected[name]) for name in expected)
    assert refused in (0, 3)


@pytest.mark.parametrize("hooked", ["checkpoint", "save_on_cpu"])
def test_saved_tensors_behind_hooks_are_read_once(hooked: str) -> None:
    """Checkpointing may begin between two batches: the graph looks the same."""
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.LayerNorm(3)).double()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.hooked = body, False

        def forward(self, x: Tensor) -> Tensor:
            if not self.hooked:
                return self.body(x)
            if hooked == "checkpoint":
                return checkpoint(self.body, x, use_reentrant=False)  # type: ignore[no-any-return]
            with torch.autograd.graph.save_on_cpu():
                return self.body(x)  # type: ignore[no-any-return]

    model = Model()
    for turn in range(5):
        model.hooked = turn >= 2
        x = torch.randn(4, 3, dtype=torch.float64)
        grads = persample.per_sample(model, lambda out, _: out.square().sum(1), x).grads()
        expected = loop_grads(model, lambda out, _: out.square().sum(1), x, None)
        for name, rows in expected.items():
            torch.testing.assert_close(grads[name], rows, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["outputs", "vmap"])
def test_losses_centred_over_the_batch_are_refused(backend: str) -> None:
    """Their sum is constant: every gradient of it vanishes, and rows of zeros would add up."""

    def centred(outputs: Tensor, _: Any) -> Tensor:
        return outputs[:, 0] - outputs[:, 0].mean()

    with pytest.raises((persample.CheckError, persample.CoupledSamplesError, persample.UnsupportedError)):
        persample.per_sample(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), centred, torch.randn(5, 3), backend=backend)
    model = nn.Linear(3, 2)
    with pytest.raises(persample.CheckError):
        persample.grad(centred(model(torch.randn(5, 3)), None), model.parameters())
