"""Errors whose advice is followed to the letter: second derivatives, and layers called apart from the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from fngd import FNGD, KFAC, NGD, SKFAC, Eva

pytestmark = pytest.mark.usefixtures("double")

METHODS: dict[str, Callable[..., Any]] = {
    "ngd": lambda model, *g, **o: NGD(model, *g, lr=0.05, **o),
    "network": lambda model, *g, **o: NGD(model, *g, lr=0.05, gram="network", **o),
    "fngd": lambda model, *g, **o: FNGD(model, *g, lr=0.05, steps_per_epoch=2, **o),
    "kfac": lambda model, *g, **o: KFAC(model, *g, lr=0.05, **o),
    "skfac": lambda model, *g, **o: SKFAC(model, *g, lr=0.05, **o),
    "eva": lambda model, *g, **o: Eva(model, *g, lr=0.05, **o),
}


def critic() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))


def points(seed: int, size: int = 5) -> Tensor:
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))


def slopes(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    [slope] = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def penalty_by_weights(model: nn.Module, x: Tensor) -> Tensor:
    """A penalty on the gradient of the weights, ‖∂L/∂θ‖²."""
    grads = torch.autograd.grad(model(x).square().mean(), list(model.parameters()), create_graph=True)
    return torch.stack([grad.square().sum() for grad in grads]).sum()


PENALTIES = {"inputs": slopes, "weights": penalty_by_weights}


def grads(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_penalty(name: str, penalty: str) -> None:
    """The error names a context; within it the penalty's gradient is the plain one, and no part of what is counted."""
    found = []
    for penalised in (False, True):
        model = critic()
        opt = METHODS[name](model)
        for step in range(4):
            loss = model(points(step)).mean() - model(points(10 + step)).mean()
            if penalised:
                with pytest.raises(RuntimeError, match=r"with optimizer\.paused\(\):"):
                    PENALTIES[penalty](model, points(20 + step)).backward()
                opt.zero_grad()
                with opt.paused():
                    loss = loss + 0.1 * PENALTIES[penalty](model, points(20 + step))
            loss.backward()
            found.append(grads(model))
            opt.step()
            opt.zero_grad()
        opt.remove()
    model = critic()
    if name in ("ngd", "network", "fngd"):
        (0.1 * PENALTIES[penalty](model, points(20))).backward()
        for with_it, without, own in zip(found[4], found[0], grads(model), strict=True):
            torch.testing.assert_close(with_it, without + own)


@pytest.mark.parametrize("name", METHODS)
def test_passes_inside_are_not_counted(name: str) -> None:
    """A loss that runs inside and is thrown away leaves no trace: tables, statistics and random numbers."""
    states = []
    for disturbed in (False, True):
        model = critic()
        opt = METHODS[name](model)
        for step in range(4):
            if disturbed:
                with opt.paused():
                    model(points(50 + step, 7)).square().mean().backward()
                opt.zero_grad()
            model(points(step)).square().mean().backward()
            opt.step()
            opt.zero_grad()
        states.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(states[0], states[1])


@pytest.mark.parametrize("joint", [False, True])
def test_a_handle_is_paused_and_goes_on_after_an_exception(joint: bool) -> None:
    model, asked = critic(), []
    policy = (lambda grads: asked.append(sorted(grads)) or {}) if joint else (lambda layer, grads: asked.append(layer))
    handle = persample.reweight(model, policy, joint=joint)
    before = model(points(0)).mean()
    with pytest.raises(ZeroDivisionError), handle.paused(), handle.paused():
        slopes(model, points(0)).backward()
        before.backward()  # a graph from before: plain as well
        raise ZeroDivisionError
    assert not asked
    assert not handle.is_paused
    plain = critic()
    (slopes(plain, points(0)) + plain(points(0)).mean()).backward()
    torch.testing.assert_close(grads(model), grads(plain))
    model(points(0)).mean().backward()
    assert asked


# --- forward passes apart from the model's own ---------------------------------------------------------------------


class Agent(nn.Module):
    """Its training loss comes from a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head, self.other = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).tanh())

    def evaluate(self, x: Tensor) -> Tensor:
        return self.other(self.encoder(x).tanh())


def in_parts() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.Linear(3, 6), "head": nn.Linear(6, 2)})
    return model, lambda x: model["head"](model["encoder"](x).tanh())


def in_a_method() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = Agent()
    return model, model.evaluate


def by_submodules() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = Agent()
    return model, lambda x: model.head(model.encoder(x).tanh())


@pytest.mark.parametrize("make", [in_parts, in_a_method, by_submodules])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "network"])
def test_a_forward_apart_from_the_models(name: str, make: Callable[[], Any]) -> None:
    """With the batch_axis that the error names, the optimiser does what it does on a model of these parts."""
    model, forward = make()
    opt = METHODS[name](model)
    with pytest.raises(ValueError, match=r"the batch size is unknown.*give the optimiser") as told:
        forward(points(0)).square().mean().backward()
    opt.remove()
    [advised] = re.findall(r"batch_axis=(\d+)", str(told.value))
    for p in model.parameters():
        p.grad = None
    opt = METHODS[name](model, batch_axis=int(advised))

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.run = make()

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    whole = Whole()
    truth = METHODS[name](whole)
    for step in range(3):
        for o, run in ((opt, forward), (truth, whole)):
            run(points(step)).square().mean().backward()
            o.step()
            o.zero_grad()
    torch.testing.assert_close([p.detach() for p in model.parameters()], [p.detach() for p in whole.parameters()])


def test_one_matrix_for_all_layers_needs_the_models_forward() -> None:
    """gram="network" was solved layer by layer there, without a word."""
    model, forward = in_parts()
    opt = METHODS["network"](model, batch_axis=0)
    with pytest.raises(ValueError, match=r"called apart from the model's own forward.*gram='layer'"):
        forward(points(0)).square().mean().backward()
    opt.remove()
    opt = METHODS["network"](model, [{"params": model.parameters(), "precondition": False}], batch_axis=0)
    model.zero_grad()
    forward(points(0)).square().mean().backward()
    plain, run = in_parts()
    run(points(0)).square().mean().backward()
    torch.testing.assert_close(grads(model), grads(plain))


def test_another_batch_apart_from_the_models_forward_is_not_read_by_the_latest_ones_size() -> None:
    """The model has met 8 samples; then a method runs 5 sequences of 8."""
    model, sizes = Agent(), dict[str, int]()
    handle = persample.reweight(model, lambda layer, grads: sizes.update({layer: grads.batch_size}))
    model(points(0, 8)).mean().backward()
    assert sizes == {"encoder": 8, "head": 8}
    with pytest.raises(ValueError, match="the batch size is unknown at layer 'other'"):
        model.evaluate(torch.randn(5, 8, 3)).mean().backward()
    model.head(model.encoder(torch.randn(16, 3)).tanh()).mean().backward()  # their axis is known
    assert sizes == {"encoder": 16, "head": 16}
    handle.remove()
