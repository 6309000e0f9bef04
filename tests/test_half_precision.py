"""Half precision: its rounding of the batch gradient is no fault of the rows, and a real fault is still seen."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import loop_grads, rel_err
from torch import Tensor, nn

import persample
from persample.blocks import Block, Dense, Rows
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
    reading = importlib.import_module("persample.reading")
    find = reading.find_uses

    def without_one(*args: Any, **options: Any) -> Any:
        uses, known = find(*args, **options)
        return {name: found[:1] for name, found in uses.items()}, known

    monkeypatch.setattr(reading, "find_uses", without_one)
    with pytest.raises(persample.CheckError, match=r"'norm\.(weight|bias)' that do not add up"):
        persample.per_sample(Twice().bfloat16(), squares, batch("shared", torch.bfloat16))


def test_a_wrong_owner_is_seen_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = importlib.import_module("persample.reading")
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
    found = persample.per_sample(model, squares, x).grads()
    for name, rows in loop_grads(model, squares, x, None).items():
        assert rel_err(found[name], rows.float()) < 16 * torch.finfo(dtype).eps
