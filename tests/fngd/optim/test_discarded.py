"""Backward passes whose gradients are thrown away by the model's `zero_grad()`: no part of the step that follows."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fngd import EKFAC, FNGD, KFAC, MBF, NGD, SKFAC, Eva

pytestmark = pytest.mark.usefixtures("double")
KINDS: dict[str, Any] = {
    "position": lambda model: FNGD(model, steps_per_epoch=2),
    "network": lambda model: FNGD(model, steps_per_epoch=2, gram="network"),
    "stored and joint": lambda model: FNGD(model, steps_per_epoch=2, accumulate="joint"),
    "joint": lambda model: NGD(model, accumulate="joint", kl_clip=1e-4),
    "clip": lambda model: NGD(model, kl_clip=1e-4),
    "kfac": lambda model: KFAC(model, inverse_every=1),
    "ekfac": EKFAC,
    "mbf": MBF,
    "skfac": SKFAC,
    "eva": Eva,
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(model: nn.Module, number: int) -> Tensor:
    random = torch.Generator().manual_seed(number)
    return F.cross_entropy(model(torch.randn(5, 3, generator=random)), torch.randint(2, (5,), generator=random))


def values(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["passes", "exception"])
def test_a_generators_step_changes_nothing(end: str, kind: str):
    """The discriminator's part of a GAN's loop, with and without the generator's backward pass through it."""
    results = []
    for disturbed in (False, True):
        model = net()
        opt = KINDS[kind](model)
        for number in range(6):
            model.zero_grad()
            for part in range(2):
                (loss_of(model, 2 * number + part) / 2).backward()
            opt.step()
            if disturbed:  # the generator's; its gradients here are cleared by the next iteration's zero_grad()
                if end == "exception":
                    handle = model[1].register_full_backward_hook(_interrupt)
                    with pytest.raises(KeyboardInterrupt):
                        (100 * loss_of(model, 50 + number)).backward()
                    handle.remove()
                else:
                    (100 * loss_of(model, 50 + number)).backward()
        results.append(values(model))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["position", "joint", "kfac"])
@pytest.mark.parametrize("how", ["grad", "hooks"])
def test_gradients_that_are_gathered_elsewhere_count(how: str, kind: str):
    """By autograd.grad, or by hooks that take them out of `.grad`: the same as ordinary accumulation."""
    results = []
    for elsewhere in (False, True):
        model = net()
        opt = KINDS[kind](model)
        params = list(model.parameters())
        for number in range(4):
            if not elsewhere:
                for part in range(2):
                    (loss_of(model, 2 * number + part) / 2).backward()
            else:
                sums = _gathered(how, model, number)
                for param, total in zip(params, sums, strict=True):
                    param.grad = total
            opt.step()
            opt.zero_grad()
        results.append(values(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def _gathered(how: str, model: nn.Module, number: int) -> list[Tensor]:
    params = list(model.parameters())
    sums = {param: torch.zeros_like(param) for param in params}

    def take(param: Tensor) -> None:
        assert param.grad is not None
        sums[param] += param.grad
        param.grad = None

    hooks = [param.register_post_accumulate_grad_hook(take) for param in params] if how == "hooks" else []
    for part in range(2):
        loss = loss_of(model, 2 * number + part) / 2
        if how == "hooks":
            loss.backward()
        else:
            for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
                sums[param] += grad
    for hook in hooks:
        hook.remove()
    return list(sums.values())


def test_the_optimisers_zero_grad_ends_a_batch_all_the_same():
    """It says that a step was skipped, and the place in the epoch goes on."""
    model = net()
    opt = FNGD(model, steps_per_epoch=3)
    loss_of(model, 0).backward()
    with pytest.warns(UserWarning, match=r"counts as a batch that was skipped.* GAN.* the model's zero_grad\(\)"):
        opt.zero_grad()
    assert (opt._table.epoch, opt._table.index) == (0, 1)
    loss_of(model, 1).backward()
    model.zero_grad()  # the model's says nothing
    loss_of(model, 1).backward()
    opt.step()
    assert (opt._table.epoch, opt._table.index) == (0, 2)


def test_sharpness_aware_steps_keep_their_places():
    """Two passes a step, the first one's gradients used and thrown away; batches of other sizes in each place."""
    model = net()
    opt = FNGD(model, steps_per_epoch=2)
    for number in range(6):
        for _ in range(2):
            model.zero_grad()
            x = torch.randn(3 + number % 2, 3)
            F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()
        opt.step()
    assert (opt._table.epoch, opt._table.index) == (3, 0)
    assert set(opt._table._rows) == {("0", 0), ("2", 0)}


@pytest.mark.parametrize("kind", KINDS)
def test_both_zero_grads_after_a_generators_step(kind: str):
    """The model's has thrown the gradients away, so that the optimiser's says nothing of a batch."""
    results = []
    for disturbed in (False, True):
        model = net()
        opt = KINDS[kind](model)
        for number in range(6):
            opt.zero_grad()
            loss_of(model, number).backward()
            opt.step()
            if disturbed:
                (100 * loss_of(model, 50 + number)).backward()
                model.zero_grad()
        results.append(values(model))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_a_skipped_batch_is_warned_of_once_and_not_where_gradients_are_infinite():
    model = net()
    opt = FNGD(model, steps_per_epoch=9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (loss_of(model, 0) * torch.inf).backward()
        opt.zero_grad()
        assert not caught
        for number in range(3):
            loss_of(model, number).backward()
            opt.zero_grad()
    assert len(caught) == 1
    assert opt._table.index == 4


@pytest.mark.parametrize("bad", [-1, 5])
def test_ids_out_of_range(bad: int):
    opt = FNGD(net(), steps_per_epoch=1, share="sample", samples=5)
    with pytest.raises(ValueError, match=r"must be 0 to 4"):
        opt.next_batch(torch.tensor([0, 1, bad]))
