"""A loss of another scale than the optimiser was told is noticed in the first step, and told once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

import fngd
from fngd.optim.loss_scale import running_loss

B = 16
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "KFAC": ("KFAC", {}), "EKFAC": ("EKFAC", {}), "MBF": ("MBF", {}),
    "HyLo": ("HyLo", {"select": "sample"}),
    "SKFAC": ("SKFAC", {}), "Eva": ("Eva", {}), "NGD per_layer": ("NGD", {"scale": "per_layer"}),
    "NGD damping": ("NGD", {"alpha": None, "damping": 0.1}), "NGD kl_clip": ("NGD", {"kl_clip": 1e-3}),
    "NGD improved": ("NGD", {"fisher": "improved"}),
    "FNGD per_layer": ("FNGD", {"scale": "per_layer", "steps_per_epoch": 2}),
    "NGD network": ("NGD", {"gram": "network", "scale": "per_layer"}),
}  # fmt: skip
FREE: dict[str, tuple[str, dict[str, Any]]] = {
    "NGD": ("NGD", {}), "FNGD": ("FNGD", {"steps_per_epoch": 2}), "NGD graft": ("NGD", {"scale": "graft"}),
}  # fmt: skip


def model_and_data() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(B, 6), torch.randint(3, (B,))


def build(name: str, model: nn.Module, **options: Any) -> Any:
    kind, own = {**METHODS, **FREE}[name]
    return getattr(fngd, kind)(model, lr=1e-3, **own, **options)


def warned(loop: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        loop()
    return [str(each.message) for each in found]


def scaled_loop(
    opt: Any, scaler: Any, how: str, *, clip: float | None = None, half: bool = True, steps: int = 3
) -> Any:
    model, x, y = how

    def loop() -> None:
        for _ in range(steps):
            with torch.autocast("cpu", torch.float16 if half else torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            if clip is not None:
                scaler.unscale_(opt)
                clip_grad_norm_(model.parameters(), clip)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()

    return loop


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("scale", "clip", "half"), [(65536.0, None, True), (2.0, None, False), (3000.0, None, True), (1024.0, 1e-3, True)]
)
def test_a_scaler_that_the_optimiser_does_not_know(name: str, scale: float, clip: float | None, half: bool) -> None:
    problem = model_and_data()
    opt, scaler = build(name, problem[0]), torch.amp.GradScaler("cpu", init_scale=scale)
    (sentence,) = warned(scaled_loop(opt, scaler, problem, clip=clip, half=half))
    assert "give it to the optimiser as scaler=" in sentence
    assert clip is not None or f"divided by {scale:g} " in sentence

    problem = model_and_data()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    assert warned(scaled_loop(build(name, problem[0], scaler=scaler), scaler, problem, clip=clip, half=half)) == []


@pytest.mark.parametrize("name", [*METHODS, *FREE])
def test_ordinary_loops_are_not_told_of(name: str) -> None:
    for clip in (None, 1e-3, 1e9):
        model, x, y = model_and_data()
        opt = build(name, model)
        off = torch.amp.GradScaler("cpu", enabled=False)
        assert warned(scaled_loop(opt, off, (model, x, y), clip=clip, half=False)) == []
    model, x, y = model_and_data()
    opt = build(name, model)

    def accumulating() -> None:
        for _ in range(2):
            for part in range(2):
                (F.cross_entropy(model(x[part::2]), y[part::2]) / 2).backward()
            opt.step()
            opt.zero_grad()

    if not name.startswith("FNGD"):
        assert warned(accumulating) == []


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_depend_on_the_scale_is_not_told_of(name: str) -> None:
    problem = model_and_data()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert warned(scaled_loop(build(name, problem[0]), scaler, problem)) == []
    model, x, y = model_and_data()
    opt = build(name, model)
    assert warned(lambda: _step(opt, F.cross_entropy(model(x), y, reduction="sum"))) == []


def _step(opt: Any, loss: Tensor) -> None:
    loss.backward()
    opt.step()
    opt.zero_grad()


def sums(output: Tensor, y: Tensor) -> dict[str, Tensor]:
    wanted = F.one_hot(y, 3).to(output)
    return {
        "cross_entropy": F.cross_entropy(output, y, reduction="sum"),
        "mse": F.mse_loss(output, wanted, reduction="sum"),
        "bce": F.binary_cross_entropy_with_logits(output, wanted, reduction="none").sum(),
        "by sample": (output - wanted).square().mean(1).sum(),
    }


def means(output: Tensor, y: Tensor) -> dict[str, Tensor]:
    wanted = F.one_hot(y, 3).to(output)
    return {
        "cross_entropy": F.cross_entropy(output, y),
        "mse": F.mse_loss(output, wanted),
        "by sample": (output - wanted).square().sum(1).mean(),
    }


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("given", ["mean", "sum"])
def test_a_sum_under_mean_and_the_reverse(given: str, reduction: str, scaled: bool, name: str) -> None:
    losses = sums if given == "sum" else means
    for key in losses(torch.randn(B, 3), torch.randint(3, (B,))):
        model, x, y = model_and_data()
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
        found = warned(partial(three_steps, model, build(name, model, reduction=reduction, scaler=scaler), scaler,
                               lambda output, key=key, y=y: losses(output, y)[key], x))  # fmt: skip
        assert len(found) == (given != reduction), (key, found)
        if found:
            assert f"reduction={reduction!r}" in found[0]
            assert f"Give it reduction={given!r}" in found[0]


def three_steps(model: nn.Module, opt: Any, scaler: Any, loss: Callable[[Tensor], Tensor], x: Tensor) -> None:
    for _ in range(3):
        scaler.scale(loss(model(x))).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()


@pytest.mark.parametrize("name", METHODS)
def test_totals_that_are_not_over_samples_say_nothing(name: str) -> None:
    model, x, y = model_and_data()
    opt = build(name, model)
    loss = torch.stack([F.cross_entropy(model(x), y), model(x).square().mean(), x.mean()]).sum()
    assert warned(lambda: _step(opt, loss)) == []


def test_the_loss_of_the_innermost_backward_pass_is_found() -> None:
    seen: list[Tensor | None] = []
    x = torch.randn(3, requires_grad=True)
    x.register_hook(lambda grad: seen.append(running_loss()))
    loss = x.square().sum()
    loss.backward()
    assert seen == [loss]
    torch.autograd.backward([x.sum(), x.mean()])
    x.exp().backward(torch.ones(3))
    assert seen[1:] == [None, None], "not certain, or no loss"
    assert running_loss() is None


def test_the_loss_is_found_from_the_thread_of_a_device() -> None:
    seen: list[Tensor | None] = []
    x = torch.randn(3, requires_grad=True)

    def look(grad: Tensor) -> None:
        thread = Thread(target=lambda: seen.append(running_loss()))
        thread.start()
        thread.join()

    x.register_hook(look)
    loss = x.square().sum()
    loss.backward()
    assert seen == [loss]
