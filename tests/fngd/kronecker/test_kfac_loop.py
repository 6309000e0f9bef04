"""KFAC in a loop: resumed, accumulated, under a scaler, and after batches that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from preconditioned import Net, batch, check_accumulation, check_resume, close, train
from torch import nn
from torch.nn import functional as F

from fngd.kronecker.kfac import KFAC


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"inverse": "cholesky", "other": "adamw"}, {"preset": "kfac-pytorch"}])
def test_resume_is_bit_for_bit(seed: int, options: dict[str, Any]) -> None:
    check_resume(lambda model: KFAC(model, lr=0.05, statistics_every=2, inverse_every=3, **options), seed)


@pytest.mark.usefixtures("double")
def test_accumulation_has_the_factors_of_the_joined_batch() -> None:
    check_accumulation(lambda model: KFAC(model, lr=0.05))


@pytest.mark.usefixtures("double")
def test_grad_scaler_changes_nothing() -> None:
    """Scaled losses, unscaled gradients: the factors are those of the true loss."""
    model, clean = Net(), Net()
    clean.load_state_dict(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    opt, other = KFAC(model, lr=0.05, scaler=scaler), KFAC(clean, lr=0.05)
    for number in range(3):
        x, y = batch(number)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        F.cross_entropy(clean(x), y).backward()
        other.step()
        other.zero_grad()
    for name, value in clean.state_dict().items():
        close(model.state_dict()[name], value, 1e-10)


def test_skipped_step_leaves_nothing() -> None:
    """A GradScaler that meets inf calls no step; the next batch starts afresh."""
    model, clean = Net(), Net()
    clean.load_state_dict(model.state_dict())
    opt, other = KFAC(model, lr=0.05), KFAC(clean, lr=0.05)
    x, y = batch(7)
    F.cross_entropy(model(x * math.inf), y).backward()
    opt.zero_grad()
    train(model, opt, range(2))
    train(clean, other, range(2))
    for name, value in clean.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
def test_bad_batch_leaves_the_factors(bad: float, inverse: str) -> None:
    model = Net()
    opt = KFAC(model, lr=0.05, inverse_every=1, inverse=inverse)
    train(model, opt, range(3))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = {layer: {k: v.clone() for k, v in state.items()} for layer, state in opt._running.items()}
    x, y = batch(3)
    x[0, 0, 0, 0] = bad
    F.cross_entropy(model(x), y).backward()
    opt.step()  # what a loop without a GradScaler does
    opt.zero_grad()
    for layer, state in before.items():
        for name, value in state.items():
            assert torch.equal(opt._running[layer][name], value), (layer, name)
    model.load_state_dict(weights)
    opt.state.clear()
    train(model, opt, range(4, 6))
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_bad_first_batch_takes_the_plain_gradient_until_the_next_inverse() -> None:
    model = nn.Linear(2, 1)
    opt = KFAC(model, lr=1.0, momentum=0.0, kl_clip=None)
    model(torch.tensor([[math.nan, 1.0]])).sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # as if it had been repaired
    opt.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - p, torch.ones_like(p))
