"""Optimisers of attention are resumed bit for bit, and copies of its model are ordinary."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from attending import Attending, gradients, losses_of, plain_gradient, problem, step
from checkpoints import reloaded
from preconditioned import close
from torch import nn

from fngd import FNGD, KFAC, NGD, SKFAC, AdaptiveDamping, Eva, Shampoo
from fngd.natural.base import NaturalSGD

pytestmark = pytest.mark.usefixtures("double")


MAKERS: dict[str, Any] = {
    "ngd": lambda model: NGD(model, lr=0.1, kl_clip=1e-3),
    "ngd true": lambda model: NGD(model, lr=0.1, fisher="true", seed=3),
    "ngd adaptive": lambda model: NGD(model, lr=0.1, adapt_damping=AdaptiveDamping(every=1), accumulate="joint"),
    "fngd": lambda model: FNGD(model, lr=0.1, steps_per_epoch=2, other="adamw"),
    "fngd sample": lambda model: FNGD(model, lr=0.1, steps_per_epoch=2, share="sample", samples=10),
    "kfac": lambda model: KFAC(model, lr=0.1, statistics_every=2, inverse_every=3),
    "skfac": lambda model: SKFAC(model, lr=0.1, every=2),
    "eva": lambda model: Eva(model, lr=0.1, other="adamw"),
    "shampoo": lambda model: Shampoo(model.parameters(), lr=0.1, statistics_every=2, inverse_every=2),
}


def train(model: Attending, optimizer: Any, numbers: range) -> None:
    for number in numbers:
        x = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(number))
        if isinstance(optimizer, FNGD) and optimizer._table.share == "sample":
            optimizer.next_batch(torch.arange(5) + 5 * (number % 2))
        outputs = model(x)
        if isinstance(optimizer, NaturalSGD) and optimizer._method.fisher == "true":
            optimizer.sample(outputs, "gaussian")
        loss = losses_of(outputs).mean()
        loss.backward()
        optimizer.step()
        if getattr(optimizer, "measuring", False):
            optimizer.adapt(loss, losses_of(model(x)).mean())
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["cross", "widths"])
@pytest.mark.parametrize("name", MAKERS)
def test_resuming_is_bit_for_bit(name: str, kind: str) -> None:
    """The state is saved after each of the first steps, and loaded before any function is known."""
    model, _ = problem(kind)
    start = copy.deepcopy(model)
    optimizer = MAKERS[name](model)
    saved, weights = [], []
    for number in range(6):
        saved.append(reloaded((model.state_dict(), optimizer.state_dict())))
        train(model, optimizer, range(number, number + 1))
        weights.append(copy.deepcopy(model.state_dict()))
    for at in (0, 1, 3):
        values, state = saved[at]
        other = copy.deepcopy(start)
        other.load_state_dict(values)
        resumed = MAKERS[name](other)
        resumed.load_state_dict(state)
        train(other, resumed, range(at, 6))
        for key, value in weights[-1].items():
            assert torch.equal(value, other.state_dict()[key]), key
    assert not torch.equal(weights[0]["attn.in_proj_bias"], weights[-1]["attn.in_proj_bias"])


@pytest.mark.parametrize("name", ["ngd", "kfac", "skfac", "eva"])
def test_copies_are_inert_and_ordinary_afterwards(name: str) -> None:
    model, x = problem("cross")
    optimizer = MAKERS[name](model)
    step(model, optimizer, x)
    other = copy.deepcopy(model)
    other.zero_grad()
    losses_of(other(x)).mean().backward()
    for key, value in plain_gradient(other, x).items():
        close(other.get_parameter(key).grad, value, 1e-12)
    optimizer.remove()
    model.zero_grad()
    losses_of(model(x)).mean().backward()
    for key, value in gradients(other).items():
        close(model.get_parameter(key).grad, value, 1e-12)
    assert all(type(each) is nn.Parameter for net in (model, other) for each in net.parameters())
