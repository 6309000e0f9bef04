"""Mixed precision: the step is that in float32 as far as the gradient is, and an inf leaves nothing behind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import build_model, data, deviation, gradients, reference, same_leaves, same_parameters
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fngd import EKFAC, FNGD, KFAC, MBF, NGD, SKFAC, Eva, HyLo, Shampoo

OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": "per_layer"},
    {"fisher": "improved"},
    {"scale": "graft", "kl_clip": 1e-2},
]


WITH_SCALER: dict[str, Callable[..., Any]] = {
    "kfac": lambda model, **o: KFAC(model, lr=0.01, statistics_every=2, inverse_every=5, **o),
    "kfac cholesky": lambda model, **o: KFAC(model, lr=0.01, inverse="cholesky", **o),
    "ekfac": lambda model, **o: EKFAC(model, lr=0.01, inverse_every=3, **o),
    "mbf": lambda model, **o: MBF(model, lr=0.01, inverse_every=3, **o),
    "hylo": lambda model, **o: HyLo(model, lr=0.01, rank=0.5, select="interpolate", every=2, **o),
    "skfac": lambda model, **o: SKFAC(model, lr=0.01, **o),
    "skfac subsample": lambda model, **o: SKFAC(model, lr=0.01, positions="subsample", every=2, **o),
    "eva": lambda model, **o: Eva(model, lr=0.01, **o),
    "shampoo": lambda model, scaler=None, **o: Shampoo(
        model.parameters(), lr=0.01, statistics_every=2, inverse_every=5, epsilon=1e-2, **o
    ),
}
"""Methods that precondition what the backward pass has left in `.grad`; Shampoo needs no scaler, but an ε above the
noise of half precision if its first step, from moments of rank one, is to be compared."""


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float16_with_a_gradient_scaler(options: dict[str, Any]) -> None:
    """Unscaled before any Gram matrix; an inf skips the step, keeps tables clean and shifts no batch."""
    model, (x, y) = build_model(), data()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    build = lambda net: NGD(net, lr=0.05, alpha=1e-2, scaler=scaler, **options)  # noqa: E731
    plain = lambda net: NGD(net, lr=0.05, alpha=1e-2, **options)  # noqa: E731
    expected = reference(model, plain, x, y)
    opt = build(model)
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(x).float(), y)
    scaler.scale(loss).backward()
    scaler.unscale_(opt)
    assert deviation(gradients(model), expected) < 2e-2
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(opt)
    scaler.update()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**10


@pytest.mark.parametrize("build", [NGD, KFAC])
def test_a_scaler_that_is_switched_off_scales_nothing(build: Any) -> None:
    (x, y), scaler = data(), torch.amp.GradScaler("cpu", enabled=False)
    found = []
    for options in ({}, {"scaler": scaler}):
        model = build_model()
        opt = build(model, lr=0.05, kl_clip=1e-2, **options)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(opt)
        scaler.update()
        found.append([each.detach() for each in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_an_inf_skips_the_step_and_poisons_nothing() -> None:
    model, batches = build_model(), [data(16, 1), data(12, 2)]
    model[1].eval()  # no running statistics: the same gradients again
    model[1].momentum = 0.0
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    opt = FNGD(model, lr=0.0, alpha=1e-3, steps_per_epoch=2, scaler=scaler)
    clean = [reference(model, lambda net: NGD(net, lr=0.0, alpha=1e-3), x, y) for x, y in batches]

    def turn(x: Tensor, y: Tensor, inject: bool = False) -> None:
        opt.zero_grad()
        scale = math.inf if inject else 1.0
        scaler.scale(F.cross_entropy(model(x), y) * scale).backward()
        scaler.unscale_(opt)

    start = [p.detach().clone() for p in model.parameters()]
    for epoch in range(3):
        for number, (x, y) in enumerate(batches):
            inject = (epoch, number) == (0, 0)
            turn(x, y, inject)
            if inject:
                assert not all(p.grad.isfinite().all() for p in model.parameters())
            else:
                assert deviation(gradients(model), clean[number]) < 1e-4
            scaler.step(opt)
            scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    assert scaler.get_scale() == 2.0**9  # one step was skipped
    assert all(rows.isfinite().all() for rows in opt.state_dict()["coefficients"]["rows"].values())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bfloat16_autocast_direction(options: dict[str, Any]) -> None:
    model, (x, y) = build_model(), data()
    build = lambda net: NGD(net, lr=0.05, alpha=1e-1, **options)  # noqa: E731
    expected = reference(model, build, x, y)
    build(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x).float(), y)
    loss.backward()
    assert deviation(gradients(model), expected) < 5e-2


def train_without_nan(
    model: nn.Module, opt: Any, scaler: Any, dtype: torch.dtype, steps: int, *, infinite: int | None = None
) -> None:
    """Two batches in turn; the loss of step `infinite` is inf. Raises unless all stays finite and the loss falls."""
    (x, y), losses = data(32), []
    for step in range(steps):
        opt.zero_grad()
        part = slice(16 * (step % 2), 16 * (step % 2) + 16)
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(x[part]).float(), y[part])
        scaler.scale(loss * (math.inf if step == infinite else 1.0)).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.detach())
    assert torch.stack(losses).isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.stack(losses[-10:]).mean() < torch.stack(losses[:10]).mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_nan_over_many_steps_in_mixed_precision(steps: int, dtype: torch.dtype) -> None:
    model = build_model()
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, growth_interval=20)
    opt = FNGD(model, lr=0.01, steps_per_epoch=2, refresh_epochs=5, scaler=scaler if scaler.is_enabled() else None)
    train_without_nan(model, opt, scaler, dtype, steps)


def moved(model: nn.Module, build: Callable[[nn.Module], Any], dtype: torch.dtype | None, scaler: Any) -> Any:
    """What one step subtracts, as a dict; the loss is in `dtype` autocast and scaled, where they are given."""
    net, (x, y) = copy.deepcopy(model), data()
    opt = build(net)
    with torch.autocast("cpu", dtype or torch.float16, enabled=dtype is not None):
        loss = F.cross_entropy(net(x).float(), y)
    scaler.scale(loss).backward()
    scaler.step(opt)
    scaler.update()
    return {
        name: p.detach() - q.detach() for (name, p), q in zip(model.named_parameters(), net.parameters(), strict=True)
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", WITH_SCALER)
def test_preconditioned_direction_in_mixed_precision(method: str, dtype: torch.dtype) -> None:
    """Within 5 % (bfloat16: 10 %) of the step in float32; the factors are those of the unscaled loss."""
    model = build_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    off = torch.amp.GradScaler("cpu", enabled=False)
    expected = moved(model, WITH_SCALER[method], None, off)
    given = scaler if scaler.is_enabled() else None
    got = moved(model, lambda net: WITH_SCALER[method](net, scaler=given), dtype, scaler)
    assert deviation(got, expected) < (5e-2 if dtype == torch.float16 else 1e-1)


@pytest.mark.parametrize("method", WITH_SCALER)
def test_an_inf_leaves_the_state_as_if_it_had_not_been(method: str) -> None:
    """A loss of inf among ten batches: parameters, factors, counters and generators are those of nine."""
    first = build_model()
    first[1].momentum = 0.0  # the skipped batch must not move running statistics
    second = copy.deepcopy(first)
    states = []
    for net, injected in ((first, 4), (second, None)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000, backoff_factor=1 - 1e-15)
        opt = WITH_SCALER[method](net, scaler=scaler)
        for step in range(10):
            if step == 4 and injected is None:
                continue
            x, y = data(16 if step % 3 else 12, step)
            opt.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(net(x).float(), y)
            before = [p.detach().clone() for p in net.parameters()]
            scaler.scale(loss * (math.inf if step == injected else 1.0)).backward()
            scaler.step(opt)
            scaler.update()
            if step == injected:
                assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
        opt.zero_grad()
        states.append(opt.state_dict())
    assert same_parameters(first, second)
    same_leaves(*states)


@pytest.mark.parametrize(
    ("steps", "dtype"),
    [
        (40, torch.float16),
        *(pytest.param(500, kind, marks=pytest.mark.slow) for kind in (torch.float16, torch.bfloat16)),
    ],
)
@pytest.mark.parametrize("method", WITH_SCALER)
def test_preconditioned_many_steps_in_mixed_precision(method: str, steps: int, dtype: torch.dtype) -> None:
    """No NaN, one injected inf on the way, and the loss falls."""
    model = build_model()
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, growth_interval=20)
    opt = WITH_SCALER[method](model, scaler=scaler if scaler.is_enabled() else None)
    train_without_nan(model, opt, scaler, dtype, steps, infinite=steps // 2 if scaler.is_enabled() else None)
    assert all(leaf.isfinite().all() for leaf in tree_leaves(opt.state_dict()) if isinstance(leaf, Tensor))


def step_in(model: nn.Module, opt: Any, method: str, dtype: torch.dtype | None, x: Tensor, y: Tensor) -> list[Any]:
    """[gradients, what the step subtracts] of copies that have come as far as model and optimiser; no momentum."""
    net = copy.deepcopy(model)
    other = WITH_SCALER[method](net)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for group in other.param_groups:
        group["momentum"] = 0.0
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = F.cross_entropy(net(x).float(), y)
    loss.backward()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    other.step()
    return [gradients(net), {name: before[name] - p.detach() for name, p in net.named_parameters()}]


@pytest.mark.parametrize(("steps", "every"), [(21, 10), pytest.param(501, 50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", WITH_SCALER)
def test_bfloat16_directions_on_the_way(method: str, steps: int, every: int) -> None:
    """Again and again in a run under autocast, the step from there is that in float32 as far as the gradient itself is.

    When the samples are fitted, the gradient that autocast delivers is mostly rounding: off by a fifth. The methods
    may magnify that (SKFAC's factors are those of a single batch), but not by more than 5.
    """
    model, (x, y) = build_model(), data(32)
    opt = WITH_SCALER[method](model)
    for step in range(steps):
        part = slice(16 * (step % 2), 16 * (step % 2) + 16)
        if step % every == 0:
            (g, d), (exact_g, exact_d) = (
                step_in(model, opt, method, dtype, x[part], y[part]) for dtype in (torch.bfloat16, None)
            )
            assert deviation(d, exact_d) <= max(5e-2, 5 * deviation(g, exact_g))
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x[part]).float(), y[part])
        loss.backward()
        opt.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(leaf.isfinite().all() for leaf in tree_leaves(opt.state_dict()) if isinstance(leaf, Tensor))
