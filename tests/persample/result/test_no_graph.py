"""Losses that do not require a gradient are refused, as by `backward()`; what is not used has rows of zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample

BACKENDS = (*persample.backends(), "auto")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Spare(nn.Module):
    """Two layers, of which one is used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def frozen() -> Spare:
    """Nothing can be trained but what is not used."""
    model = Spare()
    model.used.requires_grad_(False)
    return model


def squares(outputs: Tensor, _: Any) -> Tensor:
    return outputs.square().sum(1)


def without_gradients(outputs: Tensor, _: Any) -> Tensor:
    with torch.no_grad():
        return squares(outputs, _)


def detached(outputs: Tensor, _: Any) -> Tensor:
    return squares(outputs.detach(), _)


MISTAKES = [
    pytest.param(frozen, squares, id="frozen"),
    pytest.param(Spare, without_gradients, id="no_grad"),
    pytest.param(Spare, detached, id="detached"),
]


def ask(model: nn.Module, loss_fn: Callable[..., Tensor], x: Tensor, backend: str, **options: Any) -> Any:
    if backend == "opacus":
        pytest.importorskip("opacus")
    return persample.per_sample(model, loss_fn, x, backend=backend, **options)


@every_backend
@pytest.mark.parametrize(("make", "loss_fn"), MISTAKES)
@pytest.mark.parametrize("check", [True, False])
def test_losses_without_a_graph_are_refused(
    make: Callable[[], nn.Module], loss_fn: Callable[..., Tensor], backend: str, check: bool
) -> None:
    """Also with the check turned off: the result would be zeros, and nothing learnt."""
    model = make()
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss_fn(model(X), None).sum().backward()
    for _ in range(2):
        with pytest.raises(persample.PerSampleError, match=r"do not require a gradient: \(4,\).*no_grad"):
            ask(model, loss_fn, X, backend, check=check)


@pytest.mark.parametrize("options", [{"hold": "graph"}, {"chunk_size": 3}, {"coupled": "rows"}], ids=str)
@pytest.mark.parametrize(("make", "loss_fn"), MISTAKES)
def test_whatever_the_options(
    make: Callable[[], nn.Module], loss_fn: Callable[..., Tensor], options: dict[str, Any]
) -> None:
    with pytest.raises(persample.PerSampleError, match="gradients enabled"):
        ask(make(), loss_fn, X, "outputs", **options)


def test_losses_alone() -> None:
    model = Spare()
    with pytest.raises(persample.PerSampleError, match=r"differentiate for \(4\)"):
        persample.grad(detached(model(X), None), model.parameters())


def test_a_mistake_after_a_good_batch() -> None:
    """A plan is there for the model, and not for losses without a graph."""
    model = Spare()
    persample.per_sample(model, squares, X)
    with pytest.raises(persample.PerSampleError, match="do not require a gradient"):
        persample.per_sample(model, detached, X)


# --- losses with a graph in which no parameter is ---------------------------------------------------------------------


class Elsewhere(Spare):
    """As a copy or a wrapper that computes with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = [Spare()]

    def forward(self, x: Tensor) -> Tensor:
        return self.model[0](x)


OPTIONS: list[dict[str, Any]] = [{}, {"check": False}, {"hold": "graph"}, {"chunk_size": 3}, {"coupled": "rows"}]


@every_backend
@pytest.mark.parametrize("make", [Elsewhere, frozen])
@pytest.mark.parametrize("check", [True, False])
def test_other_parameters_than_the_models_are_refused(make: Callable[[], nn.Module], backend: str, check: bool) -> None:
    """Zeros would be wrong, whatever else the losses depend on."""
    model, x = make(), X.clone().requires_grad_()
    words = r"none of the parameters to differentiate for \(\d: '.*every row would be zero\. Did you wrap or copy the"
    for _ in range(2):
        with pytest.raises(persample.PerSampleError, match=words):
            ask(model, squares, x, backend, check=check)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", [Elsewhere, frozen])
def test_other_parameters_whatever_the_options(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    with pytest.raises(persample.PerSampleError, match="Did you wrap or copy the model"):
        ask(make(), squares, X.clone().requires_grad_(), "outputs", **options)


@every_backend
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("model", "words"), [(Spare().requires_grad_(False), "all 4 are frozen"), (nn.ReLU(), "has none")]
)
def test_nothing_to_train(model: nn.Module, words: str, options: dict[str, Any], backend: str) -> None:
    if backend == "outputs" or "hold" not in options:
        with pytest.raises(
            persample.PerSampleError, match=f"no parameter of the model .* requires a gradient: .*{words}"
        ):
            ask(model, squares, X.clone().requires_grad_(), backend, **options)


def test_losses_alone_of_another_model() -> None:
    model, other = Spare(), Spare()
    with pytest.raises(persample.PerSampleError, match=r"\(4: '0', '1', '2', ...\).*Did you wrap or copy the model"):
        persample.grad(squares(model(X), None), other.parameters())
    both = persample.grad(squares(model(X), None), [other.used.weight, model.used.weight])
    assert [bool(rows.any()) for rows in both] == [False, True]
    with pytest.raises(ValueError, match=r"params holds no tensor.*A generator that was used before is empty"):
        persample.grad(squares(model(X), None), [])


def test_losses_that_are_the_parameter() -> None:
    losses = torch.ones(3, requires_grad=True)
    torch.testing.assert_close(persample.grad(losses, losses), (torch.eye(3),))


# --- zero is right here -------------------------------------------------------------------------------------


@every_backend
def test_an_unused_parameter_has_rows_of_zeros(backend: str) -> None:
    found = ask(Spare(), squares, X, backend)
    assert set(found.unused) == {"spare.weight", "spare.bias"}
    assert not found.grads()["spare.weight"].any()
    assert found.grads()["used.weight"].any()


@every_backend
@pytest.mark.parametrize("check", [True, False])
def test_the_callers_no_grad_does_not_matter(backend: str, check: bool) -> None:
    with torch.no_grad():
        assert ask(Spare(), squares, X, backend, check=check).grads()["used.weight"].any()


@pytest.mark.parametrize("backend", ["outputs", "vmap"])
@pytest.mark.parametrize("check", [True, False])
def test_gradients_that_are_zero_are_no_mistake(backend: str, check: bool) -> None:
    """Dead units: the losses depend on the parameters, and do not change with them."""
    found = ask(Spare(), lambda outputs, _: (outputs - 1e6).relu().sum(1), X, backend, check=check)
    assert not any(rows.any() for rows in found.grads().values())
