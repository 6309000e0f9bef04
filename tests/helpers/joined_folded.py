"""Folded rows in several processes: what each process of `test_fngd_distributed` checks."""

from __future__ import annotations

from typing import Any

import torch
from folding import Frames, Siamese
from processes import check, ddp, grads, values
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

import persample
from fngd import FNGD, NGD
from persample import Folded


def _batch(rank: int, size: int, frames: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(size, frames, 2, 4, 4, generator=generator), torch.randint(2, (size,), generator=generator)


def _build(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def _sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def folded_rows_join_by_samples(rank: int, world: int) -> None:
    """gram="global" on frames (in sequence) and views (by turns): one process on the joined batch, step for step."""
    for wrap in (ddp, _sharded):
        model, single = _build(Frames), _build(Frames)
        if wrap is ddp:
            opt, net = FNGD(model, lr=0.05, steps_per_epoch=1, alpha=1e-2, gram="global"), ddp(model)
        else:
            net = _sharded(model)
            opt = FNGD(model, lr=0.05, steps_per_epoch=1, alpha=1e-2, gram="global")
        truth = FNGD(single, lr=0.05, steps_per_epoch=1, alpha=1e-2)
        batches = [_batch(r, 4) for r in range(world)]
        joined = tuple(torch.cat(part) for part in zip(*batches, strict=True))
        for _ in range(3):
            for each, o, (x, y) in ((net, opt, batches[rank]), (single, truth, joined)):
                o.zero_grad()
                F.cross_entropy(each(x), y).backward()
            check(grads(model), grads(single), 1e-9)
            opt.step()
            truth.step()
            check(values(model), values(single), 1e-9)
        opt.remove()
        truth.remove()
    views, single = _build(Siamese), _build(Siamese)
    opt, truth = NGD(views, alpha=1e-2, gram="global"), NGD(single, alpha=1e-2)
    pairs = [torch.randn(2, 4, 1, 4, generator=torch.Generator().manual_seed(r)) for r in range(world)]
    net = ddp(views)
    net(*pairs[rank]).square().sum(1).mean().backward()
    single(*torch.cat(pairs, 1)).square().sum(1).mean().backward()
    check(grads(views), grads(single), 1e-9)
    opt.remove()
    truth.remove()


class Selected(Frames):
    """The last operation is one of which the proof does not know how it treats samples, so that nothing is proven."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).renorm(2, 0, 1e9)


def nothing_is_tried_where_processes_may_differ(rank: int, world: int) -> None:
    """FSDP2: the first pass is tried out, in every process; another number of frames later must be proven or said."""
    for kind, given in ((Frames, False), (Selected, True), (Selected, False)):
        model, sizes = _build(kind), list[int]()
        net = _sharded(model)
        where: Any = {name: Folded() for name in ("conv", "up", "mix", "project")} | {"head": 0}
        handle = persample.reweight(
            model, lambda layer, g, s=sizes: s.append(g.batch_size), batch_axis=where if given else None
        )
        refused, known = "", given or kind is Frames
        for frames in (3, 5):
            x, y = _batch(rank, 4, frames)
            try:
                F.cross_entropy(net(x), y).backward()
            except ValueError as error:
                refused = str(error)
        assert sizes == [4] * (10 if known else 6), sizes
        assert ("it was not tried out with other samples, because processes share" in refused) != known, refused
        handle.remove()


SCENARIOS = (folded_rows_join_by_samples, nothing_is_tried_where_processes_may_differ)
