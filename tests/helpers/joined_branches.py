"""Processes that run different layers beside the joined batch: what each process of `test_fngd_distributed` checks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from processes import check, everyone_has, grads, values
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fngd import FNGD, KFAC, NGD, SKFAC, AdaptiveDamping, Eva

ALPHA, WIDTH = 1e-2, 6


class Branches(nn.Module):
    """Runs the layers that it is told to, in that order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm = nn.LayerNorm(WIDTH)
        for name in "apqc":
            self.add_module(name, nn.Linear(WIDTH, WIDTH))
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.conv = nn.Conv2d(1, WIDTH, 3, padding=1)

    def forward(self, x: Tensor, path: Sequence[str]) -> Tensor:
        x = self.norm(x) if x.shape[-1] == WIDTH else x
        for name in path:
            layer = getattr(self, name)
            if name == "attn":
                x = x + layer(x, x, x, need_weights=False)[0]
            elif name == "conv":
                x = layer(x).flatten(2).mT
            else:
                x = torch.tanh(layer(x)) + 0.1 * x
        return x


Batch = tuple[Tensor, Sequence[str]]


def losses_of(outputs: Tensor) -> Tensor:
    return outputs.square().flatten(1).mean(1)


def rows(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The gradient of each sample's loss by parameter, [all samples, numbers], one sample at a time."""
    names, params = zip(*model.named_parameters(), strict=True)
    found = [
        torch.autograd.grad(losses_of(model(x[b : b + 1], path))[0], params, allow_unused=True, materialize_grads=True)
        for x, path in batches
        for b in range(len(x))
    ]
    columns = zip(*found, strict=True)
    return {name: torch.stack([each.flatten() for each in every]) for name, every in zip(names, columns, strict=True)}


def expected(batches: Sequence[Batch], layers: Sequence[str], *, alpha: float = ALPHA) -> dict[str, Tensor]:
    """d = Σ_b c_b g_b of every layer, c = (K/λ + B)⁻¹ 1 over the samples of all processes; of others the mean."""
    model, result = Branches(), {}
    own = rows(model, batches)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for layer in layers:
        names = [name for name in own if name.startswith(layer if "." in layer else f"{layer}.")]
        u = torch.cat([own[name] for name in names], 1)
        k, one = u @ u.T, torch.ones(len(u))
        c = torch.linalg.solve(k / (alpha * k.norm()) + len(u) * torch.eye(len(u)), one)
        result.update({name: (c @ own[name]).view(shapes[name]) for name in names})
    return result


def data(rank: int, size: int = 4, *shape: int) -> Tensor:
    return torch.randn(size, *(shape or (WIDTH,)), generator=torch.Generator().manual_seed(rank))


def backward(batch: Batch, **options: Any) -> dict[str, Tensor]:
    model = Branches()
    opt = NGD(model, lr=0.1, alpha=ALPHA, gram="global", **options)
    net = DistributedDataParallel(model, find_unused_parameters=True)
    losses_of(net(*batch)).mean().backward()
    opt.remove()
    return grads_or_zeros(model)


def grads_or_zeros(model: nn.Module) -> dict[str, Tensor]:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return grads(model)


def told(job: Callable[[], Any]) -> str:
    """What this process and all the others were told; they were told the same."""
    try:
        job()
    except ValueError as error:
        told = str(error)
    else:
        told = "nothing"
    assert len(set(everyone_has(told))) == 1, everyone_has(told)
    return told


def layers_are_matched_by_name(rank: int, world: int) -> None:
    """Whatever runs where, the direction is that of the joined batch."""
    paths: dict[str, Callable[[int], str]] = {
        "heads": lambda r: "apc" if r == 0 else "aqc",
        "dropped": lambda r: "apqc" if r == 0 else "aqc"[r % 2 :],
        "twice": lambda r: "appc" if r == 0 else "apc",
        "nothing in common": lambda r: "apqc"[r % 4],
        "one runs none": lambda r: "" if r == 1 else "ac",
    }
    for what, path in paths.items():
        for sizes in ([4] * world, [2 + r for r in range(world)]):
            batches = [(data(r, sizes[r]), path(r)) for r in range(world)]
            run = sorted({layer for _, layers in batches for layer in layers})
            check(backward(batches[rank]), expected(batches, run), 1e-8, what)


def shapes_may_differ(rank: int, world: int) -> None:
    """Sequences of other lengths, images of other sizes, attention that one process drops."""
    sequences = [(data(r, 3, 2 + r, WIDTH), "apc") for r in range(world)]
    check(backward(sequences[rank]), expected(sequences, "apc"), 1e-8, "lengths")
    images = [(data(r, 3, 1, 4 + r, 5), ("conv", "a")) for r in range(world)]
    check(backward(images[rank]), expected(images, ("conv", "a")), 1e-8, "images")
    mixed = [(data(r, 3, 4, WIDTH), ("a", "attn", "c") if r else ("a", "c")) for r in range(world)]
    check(backward(mixed[rank]), expected(mixed, ("a", "c", "attn.in", "attn.out")), 1e-8, "attention")


def improved_and_sums(rank: int, world: int) -> None:
    """fisher="improved" and reduction="sum" with branches: those of one process that runs both, by masks."""

    class Masked(Branches):
        def forward(self, x: Tensor, first: Any) -> Tensor:
            x = torch.tanh(self.a(x))
            p, q = torch.tanh(self.p(x)), torch.tanh(self.q(x))
            return self.c(torch.where(first[:, None], p, q))

    class Chosen(Branches):
        def forward(self, x: Tensor, first: Any) -> Tensor:
            return self.c(torch.tanh((self.p if first[0] else self.q)(torch.tanh(self.a(x)))))

    for options in ({"fisher": "improved"}, {"reduction": "sum", "damping": 0.1, "alpha": None}):
        one, many = Masked(), Chosen()
        firsts = [torch.full((4,), r == 0) for r in range(world)]
        make = lambda net, o=options, **more: NGD(net, **{"alpha": ALPHA, **o, **more})  # noqa: E731
        truth, opt = make(one), make(many, gram="global")
        net = DistributedDataParallel(many, find_unused_parameters=True)
        summed = options.get("reduction") == "sum"
        batches = (net, data(rank), firsts[rank]), (one, torch.cat(list(map(data, range(world)))), torch.cat(firsts))
        for forward, x, first in batches:
            losses = losses_of(forward(x, first))
            (losses.sum() if summed else losses.mean()).backward()
        got = grads_or_zeros(many)
        wanted = {n: p.grad / (world if summed else 1) for n, p in one.named_parameters() if p.grad is not None}
        assert len(wanted) == 8
        check({name: got[name] for name in wanted}, wanted, 1e-8, str(options))
        opt.remove()
        truth.remove()


def what_has_no_answer_is_refused_everywhere(rank: int, world: int) -> None:
    """The same sentence in every process, and no process waits."""

    def orders() -> None:
        backward((data(rank), "apqc" if rank == 0 else "aqpc"))

    def passes() -> None:
        model = Branches()
        opt, net = NGD(model, gram="global"), DistributedDataParallel(model, find_unused_parameters=True)
        try:
            for last in (False, True) if rank == 0 else (True,):
                with contextlib.nullcontext() if last else net.no_sync():
                    losses_of(net(data(rank), "ac")).mean().backward()
        finally:
            opt.remove()

    def forwards() -> None:
        model = Branches()
        opt = NGD(model, gram="global")
        try:
            sum(losses_of(model(data(rank + k), "ac")).mean() for k in range(2 if rank == 0 else 1)).backward()  # type: ignore[union-attr]
        finally:
            opt.remove()

    assert "in different orders" in told(orders)
    assert "same number of micro-batches" in told(passes)
    assert "Call the model as often in every process" in told(forwards)


def heads(rank: int) -> str:
    return "apc" if rank == 0 else "aqc"


def stored_coefficients_follow_the_branch(rank: int, world: int) -> None:
    """FNGD: later epochs look up what the first has found; a branch that is new to a batch is refused everywhere."""
    model = Branches()
    opt = FNGD(model, lr=0.0, alpha=ALPHA, gram="global", steps_per_epoch=2)
    net = DistributedDataParallel(model, find_unused_parameters=True)
    found: list[dict[str, Tensor]] = []
    for step in range(6):
        opt.zero_grad()
        batches = [(data(10 * (step % 2) + r), heads(r)) for r in range(world)]
        losses_of(net(*batches[rank])).mean().backward()
        found.append(grads_or_zeros(model))
        check(found[step], expected(batches, "apqc"), 1e-8) if step < 2 else check(found[step], found[step % 2])
        opt.step()

    def turned() -> None:
        losses_of(net(data(rank), "apc" if rank else "aqc")).mean().backward()

    def added() -> None:
        losses_of(net(data(rank), "apqc" if rank else "aqc")).mean().backward()

    opt.zero_grad()
    turned()  # nobody has coefficients of the other head, so all compute
    opt.step()
    opt.zero_grad()
    assert "no stored coefficients" in told(added)
    opt.remove()


def a_refresh_is_decided_together(rank: int, world: int) -> None:
    """One probe of all samples: every process computes anew, or none does; as one process with the joined batch."""
    for threshold in (0.9, 0.999999):
        options = {"lr": 0.0, "alpha": 1e-3, "steps_per_epoch": 1, "refresh_cosine": threshold, "probe_layer": "a"}
        model, single = Branches(), Branches()
        opt, truth = FNGD(model, gram="global", **options), FNGD(single, **options)
        net = DistributedDataParallel(model, find_unused_parameters=True)
        for step in range(4):
            # Only the first process's samples change, and in the end nobody's.
            batches = [data(r + (10 * min(step, 2) if r == 0 else 0)) for r in range(world)]
            for forward, o, x in ((net, opt, batches[rank]), (single, truth, torch.cat(batches))):
                o.zero_grad()
                losses_of(forward(x, "ac")).mean().backward()
                o.step()
            assert opt.computing == truth.computing
            assert len(set(everyone_has(opt.computing))) == 1
        opt.remove()
        truth.remove()

    def different() -> None:
        model = Branches()
        opt = FNGD(model, lr=0.0, gram="global", steps_per_epoch=1, refresh_cosine=0.9)
        net = DistributedDataParallel(model, find_unused_parameters=True)
        try:
            for _ in range(2):
                losses_of(net(data(rank), "ap" if rank else "aq")).mean().backward()
                opt.step()
                opt.zero_grad()
        finally:
            opt.remove()

    assert "Give probe_layer=" in told(different)


def samples_of_a_branch_reach_every_process(rank: int, world: int) -> None:
    """share="sample": coefficients of a layer that one process alone has run are known to who meets it next."""
    model = Branches()
    opt = FNGD(model, lr=0.0, alpha=ALPHA, steps_per_epoch=1, share="sample", samples=4 * world)
    net = DistributedDataParallel(model, find_unused_parameters=True)
    directions = []
    for epoch in range(2):
        whose = (rank + epoch) % world
        opt.zero_grad()
        opt.next_batch(torch.arange(4) + 4 * whose)
        losses_of(net(data(whose), heads(whose))).mean().backward()
        directions.append(grads_or_zeros(model))
        opt.step()
        known = opt.state_dict()["coefficients"]["rows"]
        assert {layer for layer, _ in known} == set("apqc")
        assert all(
            int(row.isfinite().sum()) == 4 * (world if layer in "ac" else 1 if layer == "p" else world - 1)
            for (layer, _), row in known.items()
        )
    check(directions[1], directions[0])
    opt.remove()


def clipping_and_damping_agree(rank: int, world: int) -> None:
    """kl_clip and adapt_damping, where a process runs another head, or no layer at all: no drift, and nobody waits."""
    for path in (heads, lambda r: "apc" if r == 0 else ""):
        for gram in ("layer", "network"):
            model = Branches()
            opt = NGD(model, lr=0.05, momentum=0.0, kl_clip=1e-9, gram=gram)
            net = DistributedDataParallel(model, find_unused_parameters=True)
            for step in range(2):
                opt.zero_grad()
                losses_of(net(data(rank + 7 * step), path(rank))).mean().backward()
                before, given = values(model), grads_or_zeros(model)
                opt.step()
                moved = {name: (before[name] - value) / 0.05 for name, value in values(model).items()}
                ratios = [moved[f"{layer}.weight"].norm() / given[f"{layer}.weight"].norm() for layer in "apc"]
                assert 0 < ratios[0] < 1
                torch.testing.assert_close(ratios[0], ratios[1])
                torch.testing.assert_close(ratios[0], ratios[2])
                for other in everyone_has(values(model)):
                    assert all(torch.equal(other[name], value) for name, value in values(model).items())
            opt.remove()
        model = Branches()
        opt = NGD(model, lr=1e-5, momentum=0.0, adapt_damping=AdaptiveDamping(every=1))
        net = DistributedDataParallel(model, find_unused_parameters=True)
        for step in range(2):
            opt.zero_grad()
            before = losses_of(net(data(rank + 7 * step), path(rank))).mean()
            before.backward()
            opt.step()
            assert all(everyone_has(opt.measuring))
            with torch.no_grad():
                after = losses_of(model(data(rank + 7 * step), path(rank))).mean()
            assert abs(opt.adapt(before, after) - 1) < 1e-2
        opt.remove()


def statistics_are_of_those_who_ran(rank: int, world: int) -> None:
    """KFAC, SKFAC, Eva: factors of a head are those of its own samples; parameters stay the same everywhere."""
    group = [dist.new_group([r]) for r in range(world)][rank]
    for make in (KFAC, SKFAC, Eva):
        model, single = Branches(), Branches()
        opt, truth = make(model, lr=0.05), make(single, lr=0.05, process_group=group)
        net = DistributedDataParallel(model, find_unused_parameters=True)
        losses_of(net(data(rank), heads(rank))).mean().backward()
        losses_of(single(data(0), heads(0))).mean().backward()
        opt.step()
        truth.step()
        mine, theirs = ({k: v.double() for k, v in o._running["p"].items()} for o in (opt, truth))
        check(mine, theirs)
        for other in everyone_has(values(model)):
            assert all(torch.equal(other[name], value) for name, value in values(model).items())
        opt.remove()
        truth.remove()


SCENARIOS = (
    layers_are_matched_by_name,
    shapes_may_differ,
    improved_and_sums,
    what_has_no_answer_is_refused_everywhere,
    stored_coefficients_follow_the_branch,
    a_refresh_is_decided_together,
    samples_of_a_branch_reach_every_process,
    clipping_and_damping_agree,
    statistics_are_of_those_who_ran,
)
