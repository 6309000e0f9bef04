"""Half precision: its rounding of the batch gradient is no fault of the rows, and a real fault is still seen."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import loop_grads, rel_err
from torch import Tensor, nn

import persample
from persample.attribution.owner import Output
from persample.attribution.support import supported_by
from persample.blocks.types import Block, Dense, Rows
from persample.rules import RULES, Site

NORM, TABLE = "NativeLayerNormBackward0", "EmbeddingBackward0"


def squares(outputs: Tensor, _: Any) -> Tensor:
    return outputs.float().square().flatten(1).sum(1)


class Twice(nn.Module):
    """One normalisation with two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.norm(self.first(x)).tanh()))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def table() -> nn.Module:
    return nn.Sequential(nn.Embedding(3, 8), nn.Tanh(), nn.Linear(8, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "norm": (normalised, "1.weight"),
    "shared": (Twice, "norm.weight"),
    "table": (table, "0.weight"),
}


def batch(name: str, dtype: torch.dtype, samples: int = 4, positions: int = 4096) -> Tensor:
    return torch.randint(3, (samples, positions)) if name == "table" else torch.randn(samples, positions, 4).to(dtype)


@pytest.mark.parametrize("hold", ["factors", "graph"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_sums_that_lose_most_of_what_is_added(name: str, dtype: torch.dtype, hold: str) -> None:
    """Autograd's own gradient is off by more than a tenth, the rows are right to half precision."""
    make, parameter = MODELS[name]
    model, x = make().to(dtype), batch(name, dtype)
    psg = persample.per_sample(model, squares, x, hold=hold)
    exact = make().double()
    exact.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    rows = loop_grads(exact, squares_in_double, x if name == "table" else x.double(), None)
    assert rel_err(psg.grads()[parameter].double(), rows[parameter]) < 0.03
    [plain] = torch.autograd.grad(squares(model(x), None).sum(), [dict(model.named_parameters())[parameter]])
    assert rel_err(plain.double(), rows[parameter].sum(0)) > 0.1
    if hold == "factors":
        assert any(parameter in note and str(dtype) in note for note in psg.notes)


def dropped(block: Block) -> Block:
    return changed(block, lambda rows: torch.cat([torch.zeros_like(rows[:1]), rows[1:]]))


def swapped(block: Block) -> Block:
    return changed(block, lambda rows: rows[[1, 0, *range(2, len(rows))]])


def changed(block: Block, change: Callable[[Tensor], Tensor]) -> Block:
    if isinstance(block, Dense):
        return Dense(change(block.values))
    assert isinstance(block, Rows)
    return replace(block, indices=change(block.indices), z=change(block.z))


@pytest.mark.parametrize("fault", [dropped, swapped])
@pytest.mark.parametrize(("name", "kind", "slot"), [("norm", NORM, 1), ("norm", NORM, 2), ("table", TABLE, 0)])
def test_a_wrong_rule_is_seen_beside_it(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: str, slot: int, fault: Callable[[Block], Block]
) -> None:
    right = RULES[kind]

    def rule(site: Site) -> Block | None:
        block = right(site)
        return block if block is None or site.slot != slot else fault(block)

    monkeypatch.setitem(RULES, kind, rule)
    with pytest.raises(persample.CheckError, match="do not add up"):
        persample.per_sample(MODELS[name][0]().bfloat16(), squares, batch(name, torch.bfloat16))


def test_a_missing_use_is_seen_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = importlib.import_module("persample.capture.analysis")
    find = reading.find_uses

    def without_one(*args: Any, **options: Any) -> Any:
        uses, known = find(*args, **options)
        return {name: found[:1] for name, found in uses.items()}, known

    monkeypatch.setattr(reading, "find_uses", without_one)
    with pytest.raises(persample.CheckError, match=r"'norm\.(weight|bias)' that do not add up"):
        persample.per_sample(Twice().bfloat16(), squares, batch("shared", torch.bfloat16))


def test_a_wrong_owner_is_seen_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = importlib.import_module("persample.capture.analysis")
    find = reading.find_uses

    def turned(*args: Any, **options: Any) -> Any:
        uses, known = find(*args, **options)
        known.owners = {
            node: tuple(owner and replace(owner, ids=(owner.ids + 1) % owner.batch) for owner in owners)
            for node, owners in known.owners.items()
        }
        return uses, known

    monkeypatch.setattr(reading, "find_uses", turned)
    with pytest.raises(persample.CheckError, match="do not add up"):
        persample.per_sample(normalised().bfloat16(), scaled, batch("norm", torch.bfloat16), torch.arange(4))


def scaled(outputs: Tensor, factors: Tensor) -> Tensor:
    """So that samples of many random positions have different gradients."""
    return factors * squares(outputs, None)


def test_other_backends_say_that_it_may_be_the_batch_gradient() -> None:
    with pytest.raises(persample.CheckError, match=r"may add thousands of numbers in torch\.bfloat16 and lose"):
        persample.per_sample(normalised().bfloat16(), squares, batch("norm", torch.bfloat16), backend="hooks")


# --- gradients below the smallest numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["outputs", "hooks"])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1e-5), (torch.float16, 1e-7), (torch.float32, 1e-40)])
def test_gradients_without_digits_are_those_of_the_loop(dtype: torch.dtype, scale: float, backend: str) -> None:
    """So few digits are left that no power of two scales them; the rows are no better than the loop's, and no worse."""
    model, x = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)).to(dtype), torch.randn(5, 6)

    def losses(outputs: Tensor, factor: float) -> Tensor:
        return factor * scale * outputs.float().square().sum(1)

    found = persample.per_sample(model, losses, x.to(dtype), 1.0, backend=backend).grads()
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    for name, rows in loop_grads(model, losses, x.to(dtype), 1.0).items():
        torch.testing.assert_close(found[name], rows.to(found[name].dtype), rtol=0.01, atol=2 * smallest)
    factor = 2.0**16 if dtype is torch.float16 else 2.0**64
    rows = persample.per_sample(model, losses, x.to(dtype), factor, backend=backend).grads()["0.weight"]
    exact = persample.per_sample(model.double(), lambda y, _: y.square().sum(1), x.to(dtype).double()).grads()
    assert rel_err(rows.double() / factor / scale, exact["0.weight"]) < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_coupled_samples_are_called_coupled_however_small(dtype: torch.dtype) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second((x @ x.T).softmax(1) @ x)

    small = 1e-5 if dtype is torch.float16 else 1e-40
    for scale in (1.0, small):
        with pytest.raises(persample.CoupledSamplesError, match="influence each other"):
            persample.per_sample(Attending().to(dtype), scaled, torch.randn(4, 4).to(dtype), torch.full((4,), scale))


# --- weights that are computed ----------------------------------------------------------------------------------------


class Merged(nn.Module):
    """A low-rank change of a frozen weight, scaled row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.scale = nn.Parameter(torch.randn(5, 6), requires_grad=False), nn.Parameter(torch.rand(5, 1))
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base + self.up @ self.down
        return nn.functional.linear(x, self.scale * weight / weight.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make",
    [Merged, lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
     lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 4, 2)))],
)  # fmt: skip
def test_computed_weights(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """The operations that compute them take rows of their own precision alone."""
    model, x = make().to(dtype), torch.randn(4, 6).to(dtype)
    psg = persample.per_sample(model, squares, x)
    exact = make().double()
    exact.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    rows = loop_grads(exact, squares_in_double, x.double(), None)
    assert rel_err({name: row.double() for name, row in psg.grads().items()}, rows) < 0.1
    total = {name: value.double() for name, value in psg.weighted_sum(torch.ones(4)).items()}
    assert rel_err(total, {name: row.sum(0) for name, row in rows.items()}) < 0.1
    assert all(row.dtype == torch.float32 for row in psg.grads().values())


def squares_in_double(outputs: Tensor, _: Any) -> Tensor:
    return outputs.square().flatten(1).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_in_half_precision_is_not_taken_for_coupling(dtype: torch.dtype) -> None:
    """The backward pass of `logcumsumexp` takes logarithms of z, which no power of two passes exactly."""

    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.decay = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.logcumsumexp(self.first(x) + self.decay, 1)

    torch.manual_seed(0)
    model, x = Scan().to(dtype), torch.randn(5, 6, 4).to(dtype)
    try:
        squares(model(x), None).sum().backward()
    except NotImplementedError as error:
        pytest.skip(f"torch {torch.__version__}: {error}")
    found = persample.per_sample(model, squares, x).grads()
    for name, rows in loop_grads(model, squares, x, None).items():
        assert rel_err(found[name], rows.float()) < 16 * torch.finfo(dtype).eps


# --- attention that is saturated ----------------------------------------------------------------------------------


class Saturated(nn.Module):
    """Attention by scores so large that most of its gradients are below the smallest numbers."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.fused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = 30 * self.q(x), self.k(x), self.v(x)
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q, k, v).mean(1)
        return ((q @ k.transpose(1, 2)).softmax(-1) @ v).mean(1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(st.integers(0, 10**6), st.sampled_from([1, 10, 30]), st.sampled_from([1, 1e-2, 1e-3, 1e-4]))
def test_what_the_loop_answers_is_answered(
    fused: bool, dtype: torch.dtype, seed: int, scale: int, small: float
) -> None:
    """Without loss scaling: whatever digits are left are those of autograd."""
    torch.manual_seed(seed)
    model, x = Saturated(fused).to(dtype), (scale * torch.randn(4, 5, 8)).to(dtype)

    def losses(outputs: Tensor, _: Any) -> Tensor:
        return small * outputs.float().square().sum(1)

    assume(bool(model(x).isfinite().all()))  # the loop has 0 · NaN for the others
    loop = {name: rows.double() for name, rows in loop_grads(model, losses, x, None).items()}
    largest = max(rows.norm() for rows in loop.values())
    for name, rows in persample.per_sample(model, losses, x).grads().items():
        assert (rows.double() - loop[name]).norm() <= 0.05 * largest


@pytest.mark.parametrize("repeat", [1, 3])
def test_numbers_that_are_zero_in_some_passes(repeat: int) -> None:
    """Next to the smallest number of the format, one weight makes a zero of it and another does not."""
    losses = torch.ones(8)

    def backward(weights: Tensor) -> list[Tensor]:
        scale = torch.cat([torch.ones(1), torch.linspace(1.5e-8, 2.9e-8, 6), torch.ones(1)])
        return [(weights * scale).half().repeat_interleave(repeat)[:, None].expand(-1, 2)]

    def mixed(weights: Tensor) -> list[Tensor]:
        (z,) = backward(weights)
        return [z + backward(weights.roll(1))[0]]

    outputs = [Output.of(backward(losses)[0])]
    (owner,) = supported_by(backward, losses, outputs, lambda _: nullcontext())
    assert owner is not None
    assert owner.ids.tolist() == torch.arange(8).repeat_interleave(repeat).tolist()
    assert supported_by(mixed, losses, outputs, lambda _: nullcontext()) == [None]
