"""Every method in the loops that people write: killed and resumed, in mixed precision, accumulated, compiled."""

from __future__ import annotations

import copy
import importlib.util
import io
import math
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fngd import FNGD, KFAC, NGD, SKFAC, AdaptiveDamping, Eva, Shampoo

STEPS_PER_EPOCH, STEPS, SAVE_EVERY = 5, 23, 3


def build_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 8), nn.Tanh(),
        nn.Linear(8, 3),
    )  # fmt: skip


def data(size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 5, 5, generator=generator), torch.randint(3, (size,), generator=generator)


METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "fngd": lambda model: FNGD(
        model, lr=0.05, steps_per_epoch=STEPS_PER_EPOCH, refresh_epochs=3, control="permuted", seed=5
    ),
    "fngd by sample": lambda model: FNGD(
        model, lr=0.05, steps_per_epoch=STEPS_PER_EPOCH, share="sample", samples=36, weight_decay=1e-3
    ),
    "fngd probed": lambda model: FNGD(
        model, lr=0.05, steps_per_epoch=STEPS_PER_EPOCH, refresh_cosine=1.0, fisher="improved", scale="graft"
    ),
    "ngd": lambda model: NGD(model, lr=0.05, kl_clip=1e-3, nesterov=True, gram="network"),
    "ngd true": lambda model: NGD(model, lr=0.05, fisher="true", other="adamw", accumulate="joint", seed=5),
    "ngd adaptive": lambda model: NGD(
        model, lr=0.05, momentum=0.0, accumulate="joint", gram="network", adapt_damping=AdaptiveDamping(every=2)
    ),
    "fngd joint": lambda model: FNGD(
        model,
        lr=0.01,
        momentum=0.0,
        steps_per_epoch=STEPS_PER_EPOCH,
        accumulate="joint",
        other="adamw",
        refresh_epochs=2,
        adapt_damping=AdaptiveDamping(every=1),
    ),
    "kfac": lambda model: KFAC(model, lr=0.05, statistics_every=2, inverse_every=5, other="adamw"),
    "kfac cholesky": lambda model: KFAC(model, lr=0.05, inverse_every=3, inverse="cholesky", preset="kfac-pytorch"),
    "skfac": lambda model: SKFAC(model, lr=0.05, every=2, positions="subsample", keep=3, seed=5),
    "eva": lambda model: Eva(model, lr=0.05, statistics_every=2, weight_decay=1e-3),
    "shampoo": lambda model: Shampoo(model.parameters(), lr=0.05, block=6, statistics_every=2, inverse_every=5),
}
ACCUMULATED = ("ngd true", "ngd adaptive", "fngd joint")
"""Methods whose batches come in several backward passes."""
WITH_SCALER: dict[str, Callable[..., Any]] = {
    "kfac": lambda model, **o: KFAC(model, lr=0.01, statistics_every=2, inverse_every=5, **o),
    "kfac cholesky": lambda model, **o: KFAC(model, lr=0.01, inverse="cholesky", **o),
    "skfac": lambda model, **o: SKFAC(model, lr=0.01, **o),
    "skfac subsample": lambda model, **o: SKFAC(model, lr=0.01, positions="subsample", every=2, **o),
    "eva": lambda model, **o: Eva(model, lr=0.01, **o),
    "shampoo": lambda model, scaler=None, **o: Shampoo(
        model.parameters(), lr=0.01, statistics_every=2, inverse_every=5, epsilon=1e-2, **o
    ),
}
"""Methods that precondition what the backward pass has left in `.grad`; Shampoo needs no scaler, but an ε above the
noise of half precision if its first step, from moments of rank one, is to be compared."""


def train(method: str, path: Path, *, kill_at: tuple[int, int] | None = None) -> None:
    """Trains from the checkpoint in `path`, if there is one, to the last step; dies at (step, moment) on the way."""
    model = build_model()
    opt = METHODS[method](model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    start = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        schedule.load_state_dict(saved["schedule"])
        start = saved["step"]
    x, y = data(36)

    def moment(number: int) -> None:
        if kill_at == (step, number):
            os.kill(os.getpid(), signal.SIGKILL)

    for step in range(start, STEPS):
        epoch, index = divmod(step, STEPS_PER_EPOCH)
        order = torch.randperm(36, generator=torch.Generator().manual_seed(epoch))
        chosen = order.split(8)[index]  # the last of 4
        if method == "fngd by sample":
            opt.next_batch(chosen)
        opt.zero_grad()
        # two backward passes of unequal size where they are one step's; of equal size where coefficients are kept
        parts = chosen.split(3 if method == "ngd true" else 4) if method in ACCUMULATED else (chosen,)
        before = 0.0
        for part in parts:
            outputs = model(x[part])
            loss = F.cross_entropy(outputs, y[part]) * len(part) / len(chosen)
            if method == "ngd true":
                opt.sample(outputs)
            moment(0)
            loss.backward()
            before += loss.detach()
        moment(1)
        opt.step()
        if getattr(opt, "measuring", False):
            opt.adapt(before, F.cross_entropy(model(x[chosen]), y[chosen]))
        schedule.step()
        moment(2)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == STEPS:
            state = {"model": model.state_dict(), "opt": opt.state_dict(), "schedule": schedule.state_dict()}
            torch.save({**state, "step": step + 1}, path.with_suffix(".partial"))
            moment(3)
            os.replace(path.with_suffix(".partial"), path)


def forked(function: Callable[[], None]) -> int:
    """Runs a function in a child process; returns its status as os.waitpid does."""
    child = os.fork()
    if not child:
        status = 1
        try:
            function()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitpid(child, 0)[1]


def kill_and_resume(method: str, kills: int, seed: int, folder: Path) -> None:
    """Runs once whole and once killed again and again; raises unless both end in the same parameters.

    Each attempt is a process of its own that starts from the file alone. They are forked from one that has imported
    torch and done nothing with it, as an import takes longer than the training.
    """
    import torch._dynamo  # optimisers import it when first used, which takes seconds in every child

    torch.set_num_threads(1)
    whole, broken = folder / "whole.pt", folder / "broken.pt"
    assert forked(lambda: train(method, whole)) == 0
    chance, deaths, restarts = random.Random(seed), 0, 0
    while deaths < kills:
        first = torch.load(broken, weights_only=True)["step"] if broken.exists() else 0
        if first == STEPS:
            broken.unlink()  # on to another life, with other deaths
            restarts += 1
            first = 0
        at = chance.randrange(first, min(first + 7, STEPS)), chance.randrange(4)
        status = forked(lambda at=at: train(method, broken, kill_at=at))
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            deaths += 1
        else:
            assert status == 0, f"attempt ended with {status}"
            _compare(whole, broken)
    assert forked(lambda: train(method, broken)) == 0
    _compare(whole, broken)
    print(f"{method}: {deaths} deaths, {restarts} restarts, bit for bit")


def _compare(first: Path, second: Path) -> None:
    one, two = (torch.load(path, weights_only=True) for path in (first, second))
    assert one["step"] == two["step"] == STEPS
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), f"{name} differs"
    same_leaves(one["opt"], two["opt"])
    assert one["opt"].get("adaptive", {}).get("factor") != 1.0, "the damping never moved"


def same_leaves(first: Any, second: Any) -> None:
    """Momentum, factors, decompositions, tables, counters and generators, bit for bit."""
    leaves, others = tree_leaves(first), tree_leaves(second)
    assert len(leaves) == len(others)
    for one, two in zip(leaves, others, strict=True):
        assert torch.equal(one, two) if isinstance(one, Tensor) else one == two


def _kill_all(kills: int, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, __file__, str(kills), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork and SIGKILL, which this system has not")
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_resumed_bit_for_bit(kills: int, tmp_path: Path) -> None:
    assert _kill_all(kills, tmp_path).count(f"{kills} deaths") == len(METHODS)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def deviation(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    a, b = (torch.cat([each[name].double().flatten() for name in expected]) for each in (got, expected))
    return ((a - b).norm() / b.norm()).item()


def same_parameters(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def reference(model: nn.Module, build: Callable[[nn.Module], Any], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The direction in float32, by a copy of the model."""
    net = copy.deepcopy(model)
    opt = build(net)
    F.cross_entropy(net(x), y).backward()
    opt.remove()
    return gradients(net)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": "per_layer"},
    {"fisher": "improved"},
    {"scale": "graft", "kl_clip": 1e-2},
]


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_nan_over_many_steps_in_mixed_precision(steps: int, dtype: torch.dtype) -> None:
    model, (x, y) = build_model(), data(32)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, growth_interval=20)
    opt = FNGD(model, lr=0.01, steps_per_epoch=2, refresh_epochs=5, scaler=scaler if scaler.is_enabled() else None)
    losses = []
    for step in range(steps):
        opt.zero_grad()
        part = slice(16 * (step % 2), 16 * (step % 2) + 16)
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(x[part]).float(), y[part])
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.detach())
    assert torch.stack(losses).isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.stack(losses[-10:]).mean() < torch.stack(losses[:10]).mean()


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
    model, (x, y) = build_model(), data(32)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, growth_interval=20)
    opt = WITH_SCALER[method](model, scaler=scaler if scaler.is_enabled() else None)
    losses = []
    for step in range(steps):
        opt.zero_grad()
        part = slice(16 * (step % 2), 16 * (step % 2) + 16)
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(x[part]).float(), y[part])
        broken = scaler.is_enabled() and step == steps // 2
        scaler.scale(loss * (math.inf if broken else 1.0)).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.detach())
    assert torch.stack(losses).isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(leaf.isfinite().all() for leaf in tree_leaves(opt.state_dict()) if isinstance(leaf, Tensor))
    assert torch.stack(losses[-10:]).mean() < torch.stack(losses[:10]).mean()


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


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_adds_up_directions(set_to_none: bool) -> None:
    model = build_model().eval()
    parts = [data(8, 1), data(5, 2), data(8, 3)]
    build = lambda net: NGD(net, lr=0.1, alpha=1e-2)  # noqa: E731
    alone = [reference(model, build, *part) for part in parts]
    opt = build(model)
    for _ in range(2):  # a second time: zero_grad has cleared
        for x, y in parts:
            (F.cross_entropy(model(x), y) / 3).backward()
        expected = {name: sum(each[name] for each in alone) / 3 for name in alone[0]}
        assert deviation(gradients(model), expected) < 1e-5
        opt.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) == set_to_none for p in model.parameters())
        assert set_to_none or not any(p.grad.any() for p in model.parameters())


def test_clipping_acts_on_the_direction() -> None:
    model, (x, y) = build_model(), data()
    direction = reference(model, lambda net: NGD(net, lr=0.1), x, y)
    total = torch.cat([d.flatten() for d in direction.values()]).norm()
    opt = NGD(model, lr=1.0, momentum=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    F.cross_entropy(model(x), y).backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3).item() == pytest.approx(total.item(), rel=1e-5)
    opt.step()
    moved = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    assert deviation(moved, {name: d * 1e-3 / total for name, d in direction.items()}) < 1e-3


def test_closure_and_hooks() -> None:
    first, (x, y) = build_model(), data()
    second = copy.deepcopy(first)
    seen: list[str] = []
    opts = [METHODS["ngd"](net) for net in (first, second)]
    opts[0].register_step_pre_hook(lambda *_: seen.append("before"))
    opts[0].register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        opts[0].zero_grad()
        loss = F.cross_entropy(first(x), y)
        loss.backward()
        return loss

    for _ in range(4):
        returned = opts[0].step(closure)
        opts[1].zero_grad()
        loss = F.cross_entropy(second(x), y)
        loss.backward()
        opts[1].step()
        assert torch.equal(returned, loss)
    assert same_parameters(first, second)
    assert seen == ["before", "after"] * 4


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2),
    "multistep": lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, [1, 3]),
    "one cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=8),  # momentum, too
    "cyclic": lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=2),
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "exponential": lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.7),
    "sequential": lambda opt: torch.optim.lr_scheduler.SequentialLR(
        opt,
        [torch.optim.lr_scheduler.LinearLR(opt, 0.1, 1.0, 2), torch.optim.lr_scheduler.ConstantLR(opt, 0.5)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # torch's own SequentialLR
def test_schedulers_see_an_ordinary_optimiser(name: str) -> None:
    """Groups with options of their own; infinite damping, so that torch.optim.SGD is the truth, step for step."""
    ours, (x, y) = build_model(), data()
    theirs = copy.deepcopy(ours)

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        return [
            {"params": [*net[0].parameters(), *net[1].parameters()], "weight_decay": 0.1},
            {"params": [*net[4].parameters(), *net[6].parameters()], "lr": 0.02, "momentum": 0.5},
        ]

    opts = [NGD(ours, groups(ours), lr=0.1, alpha=math.inf), torch.optim.SGD(groups(theirs), lr=0.1, momentum=0.9)]
    schedules = [SCHEDULERS[name](opt) for opt in opts]
    for _ in range(7):
        for net, opt, schedule in zip((ours, theirs), opts, schedules, strict=True):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
            schedule.step()
    assert [group["lr"] for group in opts[0].param_groups] == [group["lr"] for group in opts[1].param_groups]
    assert deviation(dict(ours.named_parameters()), dict(theirs.named_parameters())) < 1e-5


@pytest.mark.parametrize("other", ["sgd", "adamw"])
@pytest.mark.parametrize("method", [NGD, KFAC, SKFAC, Eva, Shampoo])
def test_one_cycle_moves_the_momentum(method: Any, other: str) -> None:
    """betas belong to groups of AdamW alone: as a default they would be what the scheduler moves."""
    model, (x, y) = build_model(), data()
    if method is Shampoo:
        matrices = [p for p in model.parameters() if p.dim() > 1]
        rest = {"params": [p for p in model.parameters() if p.dim() == 1], "rule": other}
        opt = Shampoo([{"params": matrices}, rest], lr=0.1)
    else:
        opt = method(model, lr=0.1, other=other)
    groups = opt.param_groups
    assert all(("betas" in group) == (group["rule"] == "adamw") for group in groups)
    assert {group["rule"] for group in groups} == {"sgd", other}
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=[0.1] * len(groups), total_steps=8)
    momenta = []
    for _ in range(7):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        momenta.append(groups[0]["momentum"])
        schedule.step()
    assert momenta[0] == pytest.approx(0.95)
    assert min(momenta) == pytest.approx(0.85, abs=0.01)
    assert all(group["betas"] == (0.9, 0.999) for group in groups if "betas" in group)


def test_plateau_and_a_rate_in_a_tensor() -> None:
    model, (x, y) = build_model(), data()
    opt = NGD(model, lr=torch.tensor(0.1), kl_clip=1e-3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        schedule.step(1.0)
    assert float(opt.param_groups[0]["lr"]) < 0.1


def test_copies_of_the_model_train_on_their_own() -> None:
    model, (x, y) = build_model(), data()
    for method, build in METHODS.items():
        opt = build(model)
        if method == "fngd by sample":
            opt.next_batch(torch.arange(16))
        outputs = model(x)
        if method == "ngd true":
            opt.sample(outputs)
        F.cross_entropy(outputs, y).backward()
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [
            copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
        ]  # fmt: skip
        if method != "shampoo":  # it has no hooks
            opt.remove()
        truth = copy.deepcopy(model)
        for net in (truth, *copies):
            net.zero_grad()
            F.cross_entropy(net(x), y).backward()
        for net in copies:
            assert deviation(gradients(net), gradients(truth)) == 0
            NGD(net, lr=0.1).remove()
        average = torch.optim.swa_utils.AveragedModel(model)
        average.update_parameters(model)
        model.zero_grad()


@pytest.mark.filterwarnings("ignore")  # Dynamo warns about the shape checks that only tests install
@pytest.mark.parametrize(
    ("method", "backend"),
    [
        ("fngd", "aot_eager"),
        ("ngd", "eager"),
        pytest.param("fngd", "eager", marks=pytest.mark.slow),
        pytest.param("ngd", "aot_eager", marks=pytest.mark.slow),
        *(
            pytest.param(name, backend, marks=pytest.mark.slow)
            for name in ("kfac", "skfac", "eva", "shampoo")
            for backend in ("eager", "aot_eager")
        ),
    ],
)
def test_torch_compile(method: str, backend: str) -> None:
    first, (x, y) = build_model(), data()
    second = copy.deepcopy(first)
    torch._dynamo.reset()
    compiled = torch.compile(second, backend=backend)
    opts = [METHODS[method](net) for net in (first, second)]
    for _ in range(STEPS_PER_EPOCH + 2):  # computed and stored coefficients
        for call, opt in zip((first, compiled), opts, strict=True):
            opt.zero_grad()
            F.cross_entropy(call(x), y).backward()
            opt.step()
    assert deviation(dict(second.named_parameters()), dict(first.named_parameters())) < 1e-4
    assert deviation(gradients(second), gradients(first)) < 1e-3
    torch._dynamo.reset()


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_accelerate() -> None:
    import accelerate

    first, (x, y) = build_model(), data()
    second = copy.deepcopy(first)
    opt = NGD(first, lr=0.05)
    accelerator = accelerate.Accelerator(cpu=True)
    model, wrapped = accelerator.prepare(first, opt)
    plain = NGD(second, lr=0.05)
    for _ in range(4):
        wrapped.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), y))
        wrapped.step()
        plain.zero_grad()
        F.cross_entropy(second(x), y).backward()
        plain.step()
    assert same_parameters(first, second)


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and logging
def test_lightning(tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = build_model()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return FNGD(self.net, lr=0.05, steps_per_epoch=2)

    module, second, (x, y) = Module(), build_model(), data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, loader)
    opt = FNGD(second, lr=0.05, steps_per_epoch=2)
    for _ in range(2):
        for part in (slice(0, 8), slice(8, 16)):
            opt.zero_grad()
            F.cross_entropy(second(x[part]), y[part]).backward()
            opt.step()
    assert same_parameters(module.net, second)


if __name__ == "__main__":
    for number, name in enumerate(METHODS):
        place = Path(sys.argv[2]) / str(number)
        place.mkdir()
        kill_and_resume(name, int(sys.argv[1]), number, place)
