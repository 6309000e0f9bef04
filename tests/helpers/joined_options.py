"""Options of NGD and FNGD, and attention, in several processes: what each process of `test_fngd_distributed` checks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import attending
import torch
from checkpoints import reloaded
from processes import (
    Model,
    alone,
    average,
    batch_of,
    build,
    check,
    ddp,
    everyone_has,
    grads,
    joined_batch,
    loss_of,
    values,
)
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from fngd import FNGD, KFAC, NGD, SKFAC, AdaptiveDamping, Eva
from fngd.kronecker.base import LayerPreconditioned

SIZES = (4, 6)
LAYERS = ("conv", "inner", "head")


def own_group() -> Any:
    """A group of this process alone."""
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


def same_parameters(model: nn.Module) -> None:
    mine = values(model)
    assert all(torch.equal(other[name], value) for other in everyone_has(mine) for name, value in mine.items())


def true_fisher_is_averaged(rank: int, world: int) -> None:
    """Each process draws labels of its own, by seed + rank; the gradient is the average of their directions."""
    group, model = own_group(), build()
    opt, net = NGD(model, lr=0.05, fisher="true", alpha=1e-2, seed=7), ddp(model)
    for step in range(3):
        state = values(model)
        opt.zero_grad()
        batch = batch_of(step, rank, SIZES[rank % 2])
        outputs = net(batch[0])
        opt.sample(outputs)
        F.cross_entropy(outputs, batch[1]).backward()
        if step == 0:
            parts = []
            for r in range(world):
                single = build()
                single.load_state_dict(state)
                other = NGD(single, fisher="true", alpha=1e-2, seed=7 + r, process_group=group)
                x, y = batch_of(step, r, SIZES[r % 2])
                outputs = single(x)
                other.sample(outputs)
                F.cross_entropy(outputs, y).backward()
                parts.append(grads(single))
            check(grads(model), average(parts))
        opt.step()
        same_parameters(model)
    opt.remove()


def dense_prediction(model: Model, state: dict[str, Tensor], batch: Any, delta: Any, g: Any, alpha: float) -> Tensor:
    """M(δ) − M(0) from each sample's gradients; `g`: what parameters outside of layers have in `.grad`."""
    model.load_state_dict(state)
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    names, params = zip(*model.named_parameters(), strict=True)
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    total = sum((g[name] * delta[name]).sum() for name in names if name.startswith("norm"))
    for layer in LAYERS:
        inside = [number for number, name in enumerate(names) if name.startswith(layer)]
        u = torch.stack([torch.cat([row[number].flatten() for number in inside]) for row in rows], 1)
        change = torch.cat([delta[names[number]].flatten() for number in inside])
        lam = alpha * torch.linalg.matrix_norm(u.T @ u)
        total = total + u.mean(1) @ change + 0.5 * ((u.T @ change).square().mean() + lam * change @ change)
    return total


def damping_adapts_alike(rank: int, world: int) -> None:
    """ρ is of the average changes, so that every process has the same damping."""
    model = build()
    opt = NGD(model, lr=0.2, momentum=0.0, alpha=1e-2, adapt_damping=AdaptiveDamping(every=1))
    net = ddp(model)
    for step in range(3):
        batch, state, factor = batch_of(step, rank, SIZES[rank % 2]), values(model), opt.damping_factor
        opt.zero_grad()
        before = loss_of(net, batch)
        before.backward()
        reduced = grads(model)
        opt.step()
        delta = {name: value - state[name] for name, value in values(model).items()}
        predicted = dense_prediction(build(), state, batch, delta, reduced, 1e-2 * factor)
        torch.testing.assert_close(opt._predicted, predicted, rtol=1e-8, atol=1e-12)
        with torch.no_grad():
            after = loss_of(model, batch)
        ratio = opt.adapt(before, after)
        changes = everyone_has([(after - before).item(), predicted.item()])
        expected = sum(each[0] for each in changes) / sum(each[1] for each in changes)
        assert abs(ratio - expected) < 1e-6 * abs(expected)
        assert all(other == (ratio, opt.damping_factor) for other in everyone_has((ratio, opt.damping_factor)))
    assert opt.damping_factor != 1
    opt.remove()


def joint_accumulation_is_averaged(rank: int, world: int) -> None:
    """accumulate="joint", with and without no_sync: the average of the directions of each process's joined batch."""
    start = values(build())
    for fisher in ("empirical", "improved"):
        make = lambda net, f=fisher, **o: NGD(net, lr=0.05, alpha=1e-2, fisher=f, **o)  # noqa: E731
        micro = [[batch_of(k, r, SIZES[k]) for k in range(2)] for r in range(world)]
        joined = [tuple(torch.cat(part) for part in zip(*parts, strict=True)) for parts in micro]
        expected = average([alone(start, batch, make) for batch in joined])
        for synchronised in (False, True):
            model = build()
            opt, net = make(model, accumulate="joint"), ddp(model)
            for k, batch in enumerate(micro[rank]):
                with net.no_sync() if k == 0 and not synchronised else contextlib.nullcontext():
                    (loss_of(net, batch) * SIZES[k] / sum(SIZES)).backward()
            check(grads(model), expected)
            opt.step()
            same_parameters(model)
            opt.remove()


def other_rule_is_one_process(rank: int, world: int) -> None:
    """other="adamw" under DDP: with gram="global" and even batches the steps of one process on the joined batch."""
    model, single = build(), build()
    options = {"lr": 0.05, "alpha": 1e-2, "other": "adamw", "other_options": {"lr": 1e-2}, "steps_per_epoch": 2}
    opt, truth = FNGD(model, gram="global", **options), FNGD(single, **options)
    net = ddp(model)
    for step in range(4):
        batches = batch_of(step % 2, rank, 4), joined_batch(step % 2, [4] * world)
        for each, o, batch in zip((net, single), (opt, truth), batches, strict=True):
            o.zero_grad()
            loss_of(each, batch).backward()
            o.step()
        check(values(model), values(single), 1e-7)
    opt.remove()


RESUMED: dict[str, Callable[[nn.Module], Any]] = {
    "true": lambda net: NGD(net, lr=0.05, fisher="true", other="adamw", seed=3),
    "joint": lambda net: FNGD(net, lr=0.05, accumulate="joint", steps_per_epoch=2, other="adamw"),
    "adaptive": lambda net: NGD(net, lr=0.05, momentum=0.0, adapt_damping=AdaptiveDamping(every=2)),
    "global": lambda net: FNGD(net, lr=0.05, gram="global", steps_per_epoch=2, refresh_epochs=2),
    "kfac": lambda net: KFAC(net, lr=0.05, statistics_every=2, inverse_every=3, other="adamw"),
}


def resuming_goes_on_bit_for_bit(rank: int, world: int) -> None:
    """Every process saves a state of its own; new models and optimisers go on from them. Bits: with two processes."""

    def turn(net: nn.Module, opt: Any, step: int) -> None:
        opt.zero_grad()
        x, y = batch_of(step % 2, rank, 6)
        outputs = net(x)
        if isinstance(opt, NGD) and opt._method.fisher == "true":
            opt.sample(outputs)
        loss = F.cross_entropy(outputs, y)
        loss.backward()
        opt.step()
        if getattr(opt, "measuring", False):
            opt.adapt(loss, loss_of(net, (x, y)))

    for make in RESUMED.values():
        model = build()
        opt = make(model)
        net = ddp(model)
        for step in range(6):
            turn(net, opt, step)
            if step == 2:
                weights, state = reloaded((model.state_dict(), opt.state_dict()))
        second = build()
        second.load_state_dict(weights)
        resumed = make(second)
        resumed.load_state_dict(state)
        net = ddp(second)
        for step in range(3, 6):
            turn(net, resumed, step)
        if world == 2:
            assert all(torch.equal(value, values(second)[name]) for name, value in values(model).items())
        else:  # DDP lays its buckets out anew after a first step, and with them the order in which it adds
            check(values(second), values(model), 1e-9)
        opt.remove()
        resumed.remove()


# --- attention --------------------------------------------------------------------------------------------------


def attentive(kind: str = "cross") -> attending.Attending:
    torch.manual_seed(2)
    return attending.Attending(kind)


def sequences(step: int, rank: int, size: int = 4) -> Tensor:
    return torch.randn(size, 3, 3, generator=torch.Generator().manual_seed(100 * step + rank))


def attention_is_one_process(rank: int, world: int) -> None:
    """Under DDP: the steps of one process on the joined batch, parts of parameters included."""
    makes: tuple[Callable[..., Any], ...] = (
        lambda net, **o: KFAC(net, lr=0.05, damping=0.1, inverse_every=2, **o),
        lambda net, **o: SKFAC(net, lr=0.05, damping=0.1, every=2, **o),
        lambda net, **o: Eva(net, lr=0.05, damping=0.1, other="adamw", **o),
        lambda net, **o: NGD(net, lr=0.05, **({"gram": "global"} if not o else {})),
        lambda net, **o: FNGD(net, lr=0.05, steps_per_epoch=2, **({"gram": "global"} if not o else {})),
    )
    group = own_group()
    for make in makes:
        model, single = attentive(), attentive()
        opt, truth = make(model), make(single, process_group=group)
        net = ddp(model)
        for step in range(4):
            joined = torch.cat([sequences(step % 2, r) for r in range(world)])
            for each, o, x in ((net, opt, sequences(step % 2, rank)), (single, truth, joined)):
                o.zero_grad()
                attending.losses_of(each(x)).mean().backward()
                o.step()
            check(values(model), values(single), 1e-7)
            same_parameters(model)
        assert "plain" not in opt.explain()["attn.in_proj_weight[4:12]"]
        opt.remove()


def sharded_attention_is_plain_and_named(rank: int, world: int) -> None:
    """FSDP2: functions need whole weights; the optimisers say so, and the gradient is that of functions=False."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for build_optimizer in (NGD, KFAC, SKFAC, Eva):
        results = []
        for functions in (True, False):
            model = fully_shard(attentive("self"), mesh=init_device_mesh("cpu", (world,)))
            opt = build_optimizer(model, lr=0.05, functions=functions)
            for step in range(3):
                opt.zero_grad()
                attending.losses_of(model(sequences(step, rank))).mean().backward()
                opt.step()
            why = opt.explain()
            expected = "plain: it is sharded (FSDP)" if functions else "plain: functions=False"
            assert why["attn.in_proj_weight"].startswith(expected)
            assert why["attn.out_proj"].startswith(expected)
            results.append(values(model))
            opt.remove()
        check(results[0], results[1], 1e-12)


class Branching(nn.Module):
    """Which functions are used is told from outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(3, 4)
        self.a, self.b, self.c = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))
        self.used: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x).tanh()
        for name in self.used:
            x = F.linear(x, getattr(self, name)).tanh()
        return x


def functions_that_one_process_has_not_met(rank: int, world: int) -> None:
    """They take the plain gradient everywhere, and are named; what all have met is preconditioned alike."""
    for make in (KFAC, SKFAC, Eva):
        model = Branching()
        opt: LayerPreconditioned = make(model, lr=0.05)
        for step, used in enumerate((("a", "b") if rank == 0 else ("a",), ("a", "b", "c"), ("c", "b", "a"))):
            model.used = used
            opt.zero_grad()
            torch.manual_seed(10 * step + rank)
            model(torch.randn(5, 3)).square().mean().backward()
            for param in model.parameters():
                param.grad = torch.zeros_like(param) if param.grad is None else param.grad
                dist.all_reduce(param.grad)
            opt.step()
            same_parameters(model)
        why = opt.explain()
        assert why["a"].startswith("preconditioned")
        assert why["b"] == why["c"]
        assert why["b"].startswith("plain: not every process had used it")
        assert set(opt._running) == {"inp", "a"}
        opt.remove()


def kept_samples_stay_in_their_process(rank: int, world: int) -> None:
    """history=: each process has V of its own samples; DDP averages the directions."""
    options = {"history": 2, "curvature_samples": 3, "curvature_every": 2, "alpha": 1e-2}
    model, single = build(), build()
    opt, truth = NGD(model, lr=0.05, **options), NGD(single, lr=0.0, **options)
    net = ddp(model)
    for step in range(4):
        single.load_state_dict(model.state_dict())
        for each, o in ((net, opt), (single, truth)):
            o.zero_grad()
            loss_of(each, batch_of(step, rank, 4)).backward()
        check(grads(model), average(everyone_has(grads(single))))
        opt.step()
        truth.step()
    opt.remove()
    truth.remove()


SCENARIOS = (
    kept_samples_stay_in_their_process,
    true_fisher_is_averaged,
    damping_adapts_alike,
    joint_accumulation_is_averaged,
    other_rule_is_one_process,
    resuming_goes_on_bit_for_bit,
    attention_is_one_process,
    sharded_attention_is_plain_and_named,
    functions_that_one_process_has_not_met,
)
