"""KFAC, SKFAC, Eva and Shampoo in several processes: what each process of `test_fngd_distributed` checks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from processes import (
    SHARDED_FLOAT32,
    batch_of,
    build,
    check,
    ddp,
    everyone_has,
    grads,
    joined_batch,
    loss_of,
    sharded,
    values,
)
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from fngd import EKFAC, KFAC, MBF, SKFAC, Eva, HyLo, Shampoo
from fngd.kronecker.eva import MeanVectors
from fngd.kronecker.kfac import KroneckerFactors
from fngd.kronecker.mbf import MiniBlocks
from fngd.kronecker.processes import COLUMNS, Ranks
from fngd.kronecker.skfac import LowRankFactors
from fngd.optim.distributed import Exchange

Make = Callable[..., Any]
METHODS: dict[str, Make] = {
    "kfac": lambda net, **o: KFAC(net, statistics_every=2, inverse_every=2, **o),
    "kfac cholesky": lambda net, **o: KFAC(net, inverse="cholesky", preset="kfac-pytorch", **o),
    "ekfac": lambda net, **o: EKFAC(net, inverse_every=2, **o),
    "mbf": lambda net, **o: MBF(net, inverse_every=2, **o),
    "mbf each": lambda net, **o: MBF(net, rows="each", **o),
    "hylo": lambda net, **o: HyLo(net, rank=1.0, select="interpolate", every=2, **o),  # all samples: none to select
    "skfac": lambda net, **o: SKFAC(net, **o),
    "kfac divided": lambda net, **o: KFAC(net, statistics_every=2, inverse_every=2, divide_inverses=True, **o),
    "skfac divided": lambda net, **o: SKFAC(net, every=2, divide_inverses=True, **o),
    "ekfac divided": lambda net, **o: EKFAC(net, inverse_every=2, divide_inverses=True, **o),
    "skfac subsample": lambda net, **o: SKFAC(net, positions="subsample", keep=2, every=2, **o),
    "eva": lambda net, **o: Eva(net, statistics_every=2, **o),
    "eva adamw": lambda net, **o: Eva(net, preset="eva", other="adamw", **o),
}


def shampoo(net: nn.Module, *, process_group: Any = None, **options: Any) -> Any:
    """With a regularisation that lets singular moments differ by rounding only."""
    return Shampoo(net.parameters(), block=3, statistics_every=2, inverse_every=2, epsilon=1e-3, **options)


def wrapped(wrap: Callable[..., nn.Module], make: Make, dtype: torch.dtype, **options: Any) -> tuple[Any, Any, Any]:
    """(model, what to call, optimiser)."""
    model = build().to(dtype)
    if wrap is sharded:
        net = sharded(model)
        return model, net, make(model, **options)
    opt = make(model, **options)
    return model, ddp(model), opt


def one_process(make: Make, net: nn.Module, **options: Any) -> Any:
    """An optimiser that exchanges nothing."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return make(net, process_group=groups[dist.get_rank()], **options)


def of_dtype(batch: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return batch[0].to(dtype), batch[1]


def same_everywhere(opt: Any, model: nn.Module) -> None:
    """Parameters and factors, bit for bit."""
    running = getattr(opt, "_running", {})
    mine = values(model), {f"{layer}.{name}": t for layer, state in running.items() for name, t in state.items()}
    for theirs in everyone_has(mine):
        for own, other in zip(mine, theirs, strict=True):
            assert own.keys() == other.keys()
            assert all(torch.equal(value, other[name]) for name, value in own.items())


def joined_factors_are_one_process(rank: int, world: int) -> None:
    """Each method, under DDP and FSDP2, in both precisions: the steps are those of one process on the joined batch."""
    options = {"lr": 0.05, "weight_decay": 1e-2}
    for name, make in {**METHODS, "shampoo": shampoo}.items():
        for wrap in (ddp, sharded):
            for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
                if wrap is sharded and dtype is torch.float32 and not SHARDED_FLOAT32:
                    continue
                model, net, opt = wrapped(wrap, make, dtype, **options)
                single = build().to(dtype)
                truth = one_process(make, single, **options)
                for step in range(4):
                    batches = batch_of(step, rank, 4), joined_batch(step, [4] * world)
                    for each, o, batch in zip((net, single), (opt, truth), batches, strict=True):
                        o.zero_grad()
                        loss_of(each, of_dtype(batch, dtype)).backward()
                        o.step()
                    check(values(model), values(single), tolerance, name)
                same_everywhere(opt, model)
                if name != "shampoo":
                    assert opt.bytes_sent > 0
                    assert opt._running["conv"]["inputs"].dtype == dtype


def uneven_batches_count_samples(rank: int, world: int) -> None:
    """A sum over uneven batches equals one process in every parameter; under a mean, in the factors."""
    sizes = [2 + 3 * r for r in range(world)]
    for name, make in METHODS.items():
        if "adamw" in name or "cholesky" in name:  # not linear in the gradient, and the preset's 16 samples
            continue
        model, net, opt = wrapped(ddp, make, torch.float64, lr=0.05, kl_clip=None, reduction="sum")
        single = build()
        truth = one_process(
            make, single, lr=0.05 / world, kl_clip=None, reduction="sum"
        )  # DDP divides the sum by the processes
        for step in range(3):
            batches = batch_of(step, rank, sizes[rank]), joined_batch(step, sizes)
            for each, o, (x, y) in zip((net, single), (opt, truth), batches, strict=True):
                o.zero_grad()
                F.cross_entropy(each(x), y, reduction="sum").backward()
                o.step()
            check(values(model), values(single), 1e-8)
        same_everywhere(opt, model)

        model, net, opt = wrapped(ddp, make, torch.float64, lr=0.05)
        single = build()
        truth = one_process(make, single, lr=0.05)
        loss_of(net, batch_of(0, rank, sizes[rank])).backward()
        loss_of(single, joined_batch(0, sizes)).backward()
        delivered = grads(model)  # an average of averages, as always in DDP
        for key, param in single.named_parameters():
            param.grad = delivered[key]
        opt.step()
        truth.step()
        check(values(model), values(single), 1e-8)


def accumulation_joins_passes_and_processes(rank: int, world: int) -> None:
    """no_sync (FSDP2: set_requires_gradient_sync): factors are exchanged once, for the batch that all passes make."""
    sizes = (1, 3)  # at most the 16 samples of Eva's preset in four processes
    for make in METHODS.values():
        for wrap in (ddp, sharded):
            model, net, opt = wrapped(wrap, make, torch.float64, lr=0.05)
            single = build()
            truth = one_process(make, single, lr=0.05)
            for k, size in enumerate(sizes):
                waiting = net.no_sync() if wrap is ddp and k == 0 else contextlib.nullcontext()
                if wrap is sharded:
                    net.set_requires_gradient_sync(k == 1)
                with waiting:
                    (loss_of(net, batch_of(k, rank, size)) * (size / sum(sizes))).backward()
                joined = joined_batch(k, [size] * world)
                (loss_of(single, joined) * (size / sum(sizes))).backward()
            opt.step()
            truth.step()
            check(values(model), values(single), 1e-8)


def bytes_are_as_predicted(rank: int, world: int) -> None:
    """R·(I + O) numbers for SKFAC while W·R is less than either, triangles for KFAC, vectors for Eva."""
    batch, size = 2, 8  # bytes of a number
    features = {"conv": (9 + 1, 4, batch), "inner": (4 + 1, 6, 9 * batch), "head": (6, 4, batch)}  # I, O, R

    def half(n: int) -> int:
        return n * (n + 1) // 2

    def rows_or_triangle(n: int, rows: int) -> int:
        return rows * n if world * rows < n else half(n)

    numbers = {
        KFAC: sum(half(i) + half(o) for i, o, _ in features.values()),
        SKFAC: sum(rows_or_triangle(i, r) + rows_or_triangle(o, r) for i, o, r in features.values()),
        Eva: sum(i + o for i, o, _ in features.values()),
    }
    for method, predicted in numbers.items():
        _, net, opt = wrapped(ddp, method, torch.float64, lr=0.05)
        for step in range(2):
            sent = opt.bytes_sent
            opt.zero_grad()
            loss_of(net, batch_of(step, rank, batch)).backward()
            opt.step()
            assert opt.bytes_sent - sent == size * (predicted + COLUMNS * len(features)), method
    assert numbers[SKFAC] <= numbers[KFAC]
    # The case SKFAC is made for: few samples beside many features; and A, G whole, as all-reduced elsewhere
    wide = nn.Linear(300, 200)
    opts = {}
    for method in (KFAC, SKFAC):
        net = torch.nn.Sequential(wide)
        opt = opts[method] = method(net, lr=0.0)
        net(torch.randn(batch, 300)).square().sum().backward()
        opt.step()
        opt.remove()
    assert opts[SKFAC].bytes_sent == size * (batch * (301 + 200) + COLUMNS)
    assert opts[KFAC].bytes_sent == size * (half(301) + half(200) + COLUMNS)
    assert opts[SKFAC].bytes_sent * 50 < size * (301**2 + 200**2)


def each_layer_is_inverted_by_one_process(rank: int, world: int) -> None:
    """divide_inverses=True: no layer twice, the dearest first, and the others receive what it was worth."""
    counted: list[int] = []

    class Counting(KroneckerFactors):
        def invert(self, running: Any, damping: float, before: Any) -> Any:
            counted.append(running["inputs"].shape[-1])
            return super().invert(running, damping, before)

    sent = {}
    for divided in (False, True):
        net = build()
        opt = KFAC(net, lr=0.05, inverse_every=2, divide_inverses=divided)
        opt._method = Counting(0.95, "eigen", None)
        counted.clear()
        for step in range(3):
            opt.zero_grad()
            loss_of(ddp(net) if not step else net, batch_of(step, 0, 4)).backward()
            opt.step()
        everyone = everyone_has(list(counted))
        sent[divided] = opt.bytes_sent
        opt.remove()
        if divided:
            assert sorted(n for each in everyone for n in each) == sorted([10, 5, 6] * 2), everyone
            assert max(map(len, everyone)) == 2 * -(-3 // world)
        else:
            assert all(sorted(each) == sorted([10, 5, 6] * 2) for each in everyone)
    # eigenvalues and eigenvectors of what this process has inverted, and the count of its statistics
    sizes = {10: (10, 4), 5: (5, 6), 6: (6, 4)}
    numbers = sum(n * (n + 1) for inputs in counted for n in sizes[inputs]) + len(counted)
    assert sent[True] - sent[False] == 8 * numbers


def layers_that_one_process_has_not_met(rank: int, world: int) -> None:
    """They count there with no samples; nobody waits for ever."""
    torch.manual_seed(5)
    pair = [torch.randn(3, 1, 4, 7), torch.randn(3, 1, 5, 7)]  # [batch, groups, features, time]
    random = torch.Generator()
    for method in (
        KroneckerFactors(0.9, "eigen", None),
        LowRankFactors("sum", 1),
        MeanVectors(0.9, None),
        MiniBlocks(0.9, "mean"),
    ):
        found = method.collect([(pair[0], pair[1])], bias=True, convolution=False, random=random)
        own = {"first": found} if rank == 0 else {"second": found} if rank == 1 else {}
        ranks = Ranks(Exchange(), ("never", "first", "second"), torch.device("cpu"), mean=True)
        joined = method.joined(own, ranks)
        assert list(joined) == ["first", "second"]
        alone = method.update(None, found, "mean")
        for statistics in joined.values():
            assert (statistics.samples, statistics.rows) == (found.samples, found.rows)
            for name, value in method.update(None, statistics, "mean").items():
                check({name: value.double()}, {name: alone[name].double()}, 1e-12)


SCENARIOS = (
    joined_factors_are_one_process,
    uneven_batches_count_samples,
    accumulation_joins_passes_and_processes,
    bytes_are_as_predicted,
    each_layer_is_inverted_by_one_process,
    layers_that_one_process_has_not_met,
)
