"""Models of kinds that nobody here had seen: each was refused, or failed, before it got its test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import loop_grads, rel_err
from torch import Tensor, nn
from torch.nn import functional as F

import persample
from persample.graph import calls


class Pair(torch.autograd.Function):
    """Two outputs, and a backward pass that reckons with a gradient of both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return x @ weight, x.sum(-1)

    @staticmethod
    def backward(ctx: Any, z: Tensor, of_sum: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return z @ weight.T + of_sum[..., None], x.flatten(0, -2).T @ z.flatten(0, -2)


class FromPair(nn.Module):
    def __init__(self, used: int) -> None:
        super().__init__()
        self.first, self.weight, self.used = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 3)), used

    def forward(self, x: Tensor) -> Tensor:
        outputs = Pair.apply(self.first(x), self.weight)
        return outputs[0] if self.used == 1 else outputs[0] * outputs[1][..., None]


class SparseWeight(nn.Module):
    """A matrix with learnt entries at fixed places."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.places = nn.Parameter(torch.randn(4)), torch.tensor([[0, 1, 2, 2], [1, 0, 3, 2]])

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(torch.sparse_coo_tensor(self.places, self.values, (3, 4), check_invariants=True), x.T).T


class Prototypes(nn.Module):
    """Distances to learnt points: torch's rule for many rows at once of their backward is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.points, self.width = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-self.width.exp() * torch.cdist(x, self.points))


class Standardised(nn.Conv2d):
    """A weight whose rows have mean zero and variance one, by batch normalisation of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


def squares(outputs: Tensor, _: Any) -> Tensor:
    return outputs.square().flatten(1).sum(1)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "custom function, one output unused": (lambda: FromPair(1), (5, 4)),
    "custom function, both outputs": (lambda: FromPair(2), (5, 3, 4)),
    "sparse matrix of parameters": (SparseWeight, (5, 4)),
    "distances to parameters": (Prototypes, (5, 4)),
    "standardised weight": (lambda: nn.Sequential(Standardised(2, 3, 3), Standardised(3, 2, 3)), (5, 2, 6, 6)),
}


@pytest.mark.parametrize("hold", ["factors", "graph"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", MODELS)
def test_every_row_is_that_of_the_loop(monkeypatch: pytest.MonkeyPatch, name: str, batch: int, hold: str) -> None:
    monkeypatch.setattr(calls, "_BATCHED", {})
    make, shape = MODELS[name]
    model = make().double()
    for _ in range(2):
        x = torch.randn(batch, *shape[1:], dtype=torch.float64)
        rows = persample.per_sample(model, squares, x, hold=hold).grads()
        assert rel_err(rows, loop_grads(model, squares, x, None)) < 1e-9


def test_a_batching_rule_of_torch_is_compared_with_single_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not used where it gives something else, in any row that was compared."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)).double(), torch.randn(5, 4, dtype=torch.float64)
    batched, counts = calls._batched, list[int]()

    def wrong(*args: Any) -> list[Tensor | None]:
        counts.append(1)
        return [found if found is None else found * 1.001 for found in batched(*args)]

    def without_rules(site: Any) -> Any:
        return None

    for kind in ("AddmmBackward0", "NativeLayerNormBackward0"):
        monkeypatch.setitem(persample.rules.RULES, kind, without_rules)
    for function, expected in ((batched, True), (wrong, False)):
        monkeypatch.setattr(calls, "_batched", function)
        monkeypatch.setattr(calls, "_BATCHED", {})
        rows = persample.per_sample(model, squares, x).grads()
        assert rel_err(rows, loop_grads(model, squares, x, None)) < 1e-9
        assert set(calls._BATCHED.values()) == {expected}
    assert counts


@pytest.mark.parametrize("backend", ["outputs", "hooks"])
def test_normalised_groups_of_no_sample(backend: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 3))
    psg = persample.per_sample(model, squares, torch.randn(0, 2, 5, 5), backend=backend)
    assert {name: tuple(rows.shape) for name, rows in psg.grads().items()} == {
        name: (0, *each.shape) for name, each in model.named_parameters()
    }
    assert all(not total.any() for total in psg.weighted_sum(torch.zeros(0)).values())


@pytest.mark.parametrize("mode", ["layer", "autocast"])
def test_chunks_of_a_model_that_computes_in_less_than_its_losses_are_in(mode: str) -> None:
    """Kernels round otherwise for another number of rows."""

    class Coarse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.to(self.first.weight.dtype)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
                x = self.second(self.first(x).tanh())
            return x.double()

    model, x = Coarse(), torch.randn(7, 64, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        chunked = persample.per_sample(model, squares, x, chunk_size=2)
        assert rel_err(chunked.norms(), persample.per_sample(model, squares, x).norms()) < 0.05


@pytest.mark.parametrize("backend", ["outputs", "hooks", "vmap"])
def test_jagged_tensors_are_refused_in_words(backend: str) -> None:
    class Jagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, *parts: Tensor) -> Tensor:
            rows = self.linear(torch.nested.as_nested_tensor(list(parts), layout=torch.jagged))
            return torch.stack([each.mean(0) for each in rows.unbind()])

    parts = tuple(torch.randn(length, 4) for length in (3, 1, 4))
    with pytest.raises(persample.UnsupportedError, match=r"nested tensors|functorch cannot batch this model"):
        persample.per_sample(Jagged(), squares, parts, backend=backend)


def test_counts_over_the_batch_are_not_had_from_chunks() -> None:
    """The losses of chunks are those of the batch, their gradients are not."""
    model, x = nn.Sequential(nn.Embedding(4, 3, scale_grad_by_freq=True), nn.Linear(3, 2)), torch.randint(4, (6, 5))
    rows = persample.per_sample(model, squares, x).grads()
    assert rel_err(rows, loop_grads(model, squares, x, None)) < 1e-4
    with pytest.raises(persample.UnsupportedError, match=r"'0' has scale_grad_by_freq=True.*Leave chunk_size out"):
        persample.per_sample(model, squares, x, chunk_size=2)


def test_losses_that_are_a_parameter() -> None:
    losses = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(persample.grad(losses, losses)[0], torch.eye(5, dtype=torch.float64))

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each, self.unused = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.each

    for _ in range(2):
        psg = persample.per_sample(Table(), lambda y, _: y, torch.randn(5, 1))
        assert torch.equal(psg.grads()["each"], torch.eye(5))
        assert not psg.grads()["unused"].any()


@pytest.mark.parametrize("backend", ["outputs", "hooks", "vmap"])
def test_a_model_without_numbers_is_refused_in_words(backend: str) -> None:
    with pytest.raises(ValueError, match=r"'weight' is on the device 'meta'.*to_empty"):
        persample.per_sample(nn.Linear(4, 3, device="meta"), squares, torch.randn(5, 4), backend=backend)
    weight = torch.empty(3, device="meta", requires_grad=True)
    with pytest.raises(ValueError, match="'0' is on the device 'meta'"):
        persample.grad(weight * 2, weight)
