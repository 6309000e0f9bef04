"""Jobs of two gloo processes: per-sample gradients of wrapped models, and the Gram matrix over both with branches."""

from __future__ import annotations

import os
import random
import tempfile
import traceback
from datetime import timedelta

import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fngd
import persample

WORLD = 2


def together(job, *arguments, limit=180):
    """What `job(rank, *arguments)` returned in each of two processes; "hangs" for one that did not end."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        workers = [context.Process(target=_work, args=(rank, folder, job, arguments)) for rank in range(WORLD)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(limit)
        results = []
        for rank, worker in enumerate(workers):
            if worker.exitcode is None:
                worker.kill()
                results.append("hangs")
            else:
                path = f"{folder}/{rank}.pt"
                results.append(torch.load(path) if os.path.exists(path) else f"died with {worker.exitcode}")
        return results


def _work(rank, folder, job, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    try:
        result = job(rank, *arguments)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


class Tied(nn.Module):
    """One table as embedding and head, a bare scale, and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.table, self.twice = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        h = self.table((x[:, 0].abs() * 5).long() % 7)
        return (self.scale * self.twice(self.twice(h).tanh())) @ self.table.weight.T


def model_of(kind):
    """A small model in float64 and the shape of its samples; the same in every process."""
    torch.manual_seed(1)
    made = {
        "mlp": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), (3,)),
        "conv": (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)), (1, 4, 4)),
        "norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1, bias=False)), (5, 3)),
        "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), (3, 4)),
        "tied": (Tied, (1,)),
    }[kind]
    return made[0]().double(), made[1]


MODELS = ("mlp", "conv", "norm", "attention", "tied")


def wrapped(kind, model):
    """The model as DDP or FSDP see it; FSDP2 in parts or as a whole."""
    cpu = torch.device("cpu")
    if kind == "DDP":
        return DistributedDataParallel(model)
    if kind.startswith("FSDP1"):
        return FullyShardedDataParallel(model, use_orig_params=kind.endswith("original"), device_id=cpu)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    if kind.endswith("parts"):
        for child in model.children():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


KINDS = ("DDP", "FSDP1 original", "FSDP1 flat", "FSDP2", "FSDP2 parts")


def loss_fn(outputs, _):
    """One loss for each sample."""
    return outputs.square().flatten(1).sum(1)


def rows_of(model, x):
    """[B, N] by the loop."""
    rows = []
    for b in range(len(x)):
        found = torch.autograd.grad(loss_fn(model(x[b : b + 1]), None)[0], list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def per_sample_job(rank, kind):
    """Faults of `per_sample` on wrapped models, in every way to ask, and how many answers and refusals there were."""
    faults, counts = [], {"exact": 0, "refused": 0}
    ways = (
        {"hold": "factors"},
        {"hold": "graph"},
        {"backend": "hooks"},
        {"backend": "vmap"},
        {"chunk_size": 2},
        {"check": False},
    )
    for name in MODELS:
        bare, shape = model_of(name)
        torch.manual_seed(10 + rank)
        x = torch.randn(4, *shape, dtype=torch.float64)
        want = rows_of(bare, x)
        for way in ways:
            where = f"rank {rank} {kind} {name} {way}"
            try:
                model = wrapped(kind, model_of(name)[0])
                psg = persample.per_sample(model, loss_fn, x, **way)
                results = {"norms": (psg.norms(), want.norm(dim=1)), "gram": (psg.gram(), want @ want.T)}
                c = torch.randn(4, dtype=torch.float64)
                length = torch.cat([g.flatten() for g in psg.weighted_sum(c).values()]).norm()
                results["weighted_sum"] = (length, (c @ want).norm())
                grads = psg.grads()
                if kind != "FSDP1 flat":
                    order = [n.replace("_fsdp_wrapped_module.", "").removeprefix("module.") for n in grads]
                    ours = dict(zip(order, grads.values(), strict=True))
                    names = [n for n, _ in bare.named_parameters()]
                    results["grads"] = (torch.cat([ours[n].flatten(1) for n in names], 1), want)
                for what, (ours, theirs) in results.items():
                    if not torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10):
                        faults.append(
                            f"{where}: {what} {ours.flatten()[:4].tolist()} instead of {theirs.flatten()[:4].tolist()}"
                        )
                counts["exact"] += 1
            except persample.PerSampleError:
                counts["refused"] += 1
            except Exception as error:
                faults.append(f"{where}: foreign {type(error).__name__}: {str(error)[:200]}")
    return faults, counts


class Branches(nn.Module):
    """A trunk, branches of which each process may run another one (or none), and a head."""

    def __init__(self, shapes):
        super().__init__()
        self.trunk, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.branches = nn.ModuleList(nn.Linear(6, 6, bias=bias) for bias in shapes)

    def forward(self, x, branch):
        h = self.trunk(x).tanh()
        for k in branch:
            h = h + self.branches[k](h).tanh()
        return self.head(h)


def branches_of(seed):
    """Model, options, batch sizes and branches by rank, of a seed."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    model = Branches([r.random() < 0.5 for _ in range(3)]).double()
    choices = [(), (0,), (1,), (2,), (0, 1), (1, 0), (2, 1), (0, 0)]
    options = {"alpha": r.choice([1e-2, 1e-1]), "scale": r.choice(["absorb", "per_layer"])}
    return model, options, [r.choice(choices) for _ in range(WORLD)], torch.randn(8, 4, dtype=torch.float64)


def branch_loss(model, x, branch):
    """The losses of some samples."""
    return model(x, branch).square().sum(1)


def global_gram_job(rank, seeds):
    """Gradients that NGD with gram="global" leaves, by seed; a sentence where it refuses."""
    out = {}
    for seed in seeds:
        model, options, branches, x = branches_of(seed)
        optimizer = fngd.NGD(model, lr=0.1, gram="global", **options)
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        try:
            parallel(x.chunk(WORLD)[rank], branches[rank]).square().sum(1).mean().backward()
            out[seed] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        except (ValueError, persample.PerSampleError) as error:
            out[seed] = f"refused: {error}"
        optimizer.remove()
    return out


def global_gram_truth(seed):
    """The joined batch's directions by layer: rows of a sample are zero in layers that its process did not run."""
    model, options, branches, x = branches_of(seed)
    each, want = len(x) // WORLD, {}
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        parameters = list(layer.parameters())
        rows = []
        for b in range(len(x)):
            loss = branch_loss(model, x[b : b + 1], branches[b // each])[0]
            found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in found]))
        u = torch.stack(rows)
        gram, batch = u @ u.T, len(x)
        if not gram.any():
            continue
        damping = options["alpha"] * gram.norm()
        c = torch.linalg.solve(gram + damping * batch * torch.eye(batch).double(), torch.ones(batch).double())
        d = (damping if options["scale"] == "absorb" else 1) * c @ u
        sizes = [p.numel() for p in parameters]
        for (name, p), part in zip(layer.named_parameters(), d.split(sizes), strict=True):
            want[f"{path}.{name}"] = part.view_as(p)
    return want
