"""NGD(history=R): directions are those of the dense Fisher matrix of the samples of the last R sub-batches."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import same_leaves
from torch import Tensor, nn
from torch.nn import functional as F

from fngd import FNGD, NGD

LAYERS = ("0", "3")

pytestmark = pytest.mark.usefixtures("double")


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))


def batch(step: int, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 1, 3, 3, generator=generator), torch.randint(3, (size,), generator=generator)


def own_gradients(model: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """[parameters of the layer, samples], a sample at a time."""
    columns: dict[str, list[Tensor]] = {layer: [] for layer in LAYERS}
    for b in range(len(x)):
        grads = torch.autograd.grad(F.cross_entropy(model(x[b : b + 1]), y[b : b + 1]), list(model.parameters()))
        for number, layer in enumerate(LAYERS):
            columns[layer].append(torch.cat([each.flatten() for each in grads[2 * number : 2 * number + 2]]))
    return {layer: torch.stack(each, 1) for layer, each in columns.items()}


def flat(model: nn.Sequential) -> dict[str, Tensor]:
    params = list(model.parameters())
    return {
        layer: torch.cat([each.grad.flatten() for each in params[2 * n : 2 * n + 2]]) for n, layer in enumerate(LAYERS)
    }


def dense(v: Tensor, g: Tensor, lam: Tensor | float, absorb: bool) -> Tensor:
    fisher = v @ v.T / v.shape[1] + lam * torch.eye(len(v))
    return torch.linalg.solve(fisher, g) * (lam if absorb else 1.0)


def check(got: Tensor, expected: Tensor) -> None:
    error = ((got - expected).norm() / expected.norm()).item()
    assert error <= 1e-8, f"relative deviation {error:.1e}"


@settings(max_examples=25)
@given(
    length=st.integers(1, 4),
    samples=st.integers(1, 6) | st.none(),
    every=st.integers(1, 3),
    network=st.booleans(),
    scale=st.sampled_from(["absorb", "per_layer"]),
    reduction=st.sampled_from(["mean", "sum"]),
    absolute=st.booleans(),
)
def test_directions_are_the_dense_ones(
    length: int, samples: int | None, every: int, network: bool, scale: str, reduction: str, absolute: bool
) -> None:
    model = net()
    damping: Any = {"damping": 0.3, "alpha": None} if absolute else {"alpha": 0.05}
    rate = 0.05 if scale == "absorb" else 1e-5
    opt = NGD(
        model, lr=rate, history=length, curvature_samples=samples, curvature_every=every, scale=scale,
        reduction=reduction, gram="network" if network else "layer", **damping,
    )  # fmt: skip
    kept: dict[str, list[Tensor]] = {layer: [] for layer in LAYERS}
    for step in range(7):
        x, y = batch(step, 5 if step % 3 else 4)
        own = own_gradients(copy.deepcopy(model).requires_grad_(), x, y)
        opt.zero_grad()
        F.cross_entropy(model(x), y, reduction=reduction).backward()
        if step % every == 0:
            for layer in LAYERS:
                kept[layer] = [*kept[layer], own[layer][:, :samples]][-length:]
        v = {layer: torch.cat(kept[layer], 1) for layer in LAYERS}
        g = {layer: own[layer].mean(1) if reduction == "mean" else own[layer].sum(1) for layer in LAYERS}
        if network:
            v, g = ({"all": torch.cat([each[layer] for layer in LAYERS])} for each in (v, g))
        expected = {
            key: dense(v[key], g[key], 0.3 if absolute else 0.05 * (v[key].T @ v[key]).norm(), scale == "absorb")
            for key in v
        }
        got = flat(model)
        if network:
            got = {"all": torch.cat([got[layer] for layer in LAYERS])}
        for key, direction in expected.items():
            check(got[key], direction)
        opt.step()
    opt.remove()


@pytest.mark.parametrize(
    "options", [{}, {"scale": "graft"}, {"kl_clip": 1e-3}, {"gram": "network"}, {"damping": 0.1, "alpha": None}]
)
def test_one_whole_batch_is_plain_natural_gradient(options: dict[str, Any]) -> None:
    models = [net(), net()]
    opts = [NGD(models[0], lr=0.1, **options), NGD(models[1], lr=0.1, history=1, **options)]
    for step in range(4):
        for model, opt in zip(models, opts, strict=True):
            x, y = batch(step)
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        check(p.detach(), q.detach())


def test_a_step_leaves_the_span_of_its_own_batch() -> None:
    outside = []
    for options in ({}, {"history": 3}):
        model = net()
        opt = NGD(model, lr=0.05, alpha=1e-3, **options)
        for step in range(3):
            x, y = batch(step, 3)
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if step < 2:
                opt.step()
        basis = torch.linalg.qr(own_gradients(copy.deepcopy(model), x, y)["3"]).Q
        direction = flat(model)["3"]
        outside.append(((direction - basis @ (basis.T @ direction)).norm() / direction.norm()).item())
    assert outside[0] < 1e-10
    assert outside[1] > 1e-3


def test_two_passes_of_a_step_keep_one_sub_batch() -> None:
    model = net()
    opt = NGD(model, lr=0.0, history=2)
    for step in range(2):
        opt.zero_grad()
        for part in range(2):
            x, y = batch(10 * step + part)
            (F.cross_entropy(model(x), y) / 2).backward()
        opt.step()
    assert [len(each) for each in opt.state_dict()["history"]["kept"].values()] == [2, 2]


def test_a_pass_that_is_thrown_away_keeps_nothing() -> None:
    models = [net(), net()]
    for number, model in enumerate(models):
        opt = NGD(model, lr=0.05, history=3)
        for step in range(3):
            if number:
                F.cross_entropy(model(batch(99)[0]), batch(99)[1]).backward()
                model.zero_grad()
            opt.zero_grad()
            x, y = batch(step)
            F.cross_entropy(model(x), y).backward()
            opt.step()
    assert all(torch.equal(p, q) for p, q in zip(*(each.parameters() for each in models), strict=True))


def test_a_batch_that_is_not_finite_leaves_later_steps_finite() -> None:
    model = net()
    opt = NGD(model, lr=0.0, history=2)
    for step in range(3):
        x, y = batch(step)
        if step == 1:
            x = x.clone()
            x[0, 0, 0, 0] = math.nan
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if step == 1:
            assert not all(p.grad.isfinite().all() for p in model.parameters())
            continue  # skipped, as a GradScaler does: zero_grad() ends its batch
        if step == 2:  # the samples of step 1 count, with gradients of zero
            own = own_gradients(copy.deepcopy(model), x, y)
            for layer, direction in flat(model).items():
                v = torch.cat([torch.zeros_like(own[layer]), own[layer]], 1)
                check(direction, dense(v, own[layer].mean(1), 1e-2 * (v.T @ v).norm(), True))
        opt.step()
    assert [len(each) for each in opt.state_dict()["history"]["kept"].values()] == [2, 2]


def test_a_scaler_changes_nothing() -> None:
    models, scaler = [net(), net()], torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for model, own in zip(models, (None, scaler), strict=True):
        opt = NGD(model, lr=0.05, history=2, scale="per_layer", damping=0.1, alpha=None, scaler=own)
        for step in range(5):
            x, y = batch(step)
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if own is None:
                loss.backward()
                opt.step()
            else:
                own.scale(loss).backward()
                own.step(opt)
                own.update()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        check(q.detach(), p.detach())


def test_resume_is_bit_for_bit() -> None:
    make = lambda model: NGD(model, lr=0.05, history=3, curvature_samples=2, curvature_every=2)  # noqa: E731
    model = net()
    opt = make(model)

    def train(each: nn.Module, with_opt: Any, steps: range) -> None:
        for step in steps:
            x, y = batch(step)
            with_opt.zero_grad()
            F.cross_entropy(each(x), y).backward()
            with_opt.step()

    train(model, opt, range(4))
    second = net()
    weights, state = copy.deepcopy((model.state_dict(), opt.state_dict()))
    second.load_state_dict(weights)
    resumed = make(second)
    resumed.load_state_dict(state)
    train(model, opt, range(4, 9))
    train(second, resumed, range(4, 9))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), second.parameters(), strict=True))
    same_leaves(opt.state_dict(), resumed.state_dict())


def test_a_state_without_history_is_told() -> None:
    state = NGD(net(), lr=0.1).state_dict()
    with pytest.raises(ValueError, match="the state has no 'history'"):
        NGD(net(), lr=0.1, history=2).load_state_dict(state)


def test_other_shapes_are_told() -> None:
    model = nn.Linear(3, 2)
    opt = NGD(model, lr=0.1, history=2)
    for step, time in enumerate((4, 6)):
        opt.zero_grad()
        loss = model(torch.randn(5, time, 3)).square().mean()
        if step:
            with pytest.raises(ValueError, match="in several steps; history= joins them"):
                loss.backward()
        else:
            loss.backward()
            opt.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history": 0}, "history=0; it must be a whole number of at least 1"),
        ({"curvature_samples": 0}, "curvature_samples=0; it must be"),
        ({"history": 2, "fisher": "true"}, "fisher='true' does not go with history="),
        ({"history": 2, "gram": "global"}, "gram='global' does not go with history="),
        ({"curvature_samples": 2, "accumulate": "joint"}, "accumulate='joint' does not go with history="),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NGD(net(), lr=0.1, **options)


def test_fngd_has_no_history() -> None:
    with pytest.raises(TypeError, match="FNGD has no option 'history'"):
        FNGD(net(), lr=0.1, steps_per_epoch=2, history=2)
