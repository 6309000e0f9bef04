"""Processes that run different layers: what each process of `test_fngd_distributed` checks, against the joined batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from processes import check, everyone_has, grads
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fngd import FNGD, NGD

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
    return {name: torch.stack([each.flatten() for each in every]) for name, every in zip(names, zip(*found), strict=True)}


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
    return {name: grad for name, grad in grads_or_zeros(model).items()}


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
                with net.no_sync() if not last else torch.enable_grad():
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


SCENARIOS = (
    layers_are_matched_by_name,
    shapes_may_differ,
    improved_and_sums,
    what_has_no_answer_is_refused_everywhere,
)
