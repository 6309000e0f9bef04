"""Random training runs of the optimisers beside their dense twins: `run(seed)`."""

from __future__ import annotations

import random
import warnings

import fuzz_preconditioners as dense
import torch
from fuzz_families import Fn
from fuzz_optimizers import Natural
from torch import nn
from torch.nn import functional as F

import fngd

METHODS = ("NGD", "NGD", "FNGD", "FNGD", "KFAC", "SKFAC", "Eva", "Shampoo")


def model_of(r):
    """A small model of linear and convolution layers, normalisations and bare parameters, with its input's shape."""
    kind, bias = (
        r.choice(["vector", "sequence", "time first", "image", "line", "tokens", "twice", "transposed"]),
        r.random() < 0.7,
    )
    out, wide = 3, r.randint(2, 5)
    act = r.choice([nn.Tanh, nn.Sigmoid, nn.Softplus])
    if kind == "vector":
        return nn.Sequential(nn.Linear(4, wide, bias), act(), nn.LayerNorm(wide), nn.Linear(wide, out)), (4,)
    if kind in ("sequence", "tokens"):
        first = nn.Embedding(6, 4) if kind == "tokens" else nn.Identity()
        body = [
            first,
            nn.Linear(4, wide, bias),
            act(),
            Fn(lambda m, x: x * m.p, p=torch.randn(wide)),
            nn.Linear(wide, 2),
        ]
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(6, out)), (3,) if kind == "tokens" else (3, 4)
    if kind == "time first":
        turn = Fn(
            lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh()).mean(0), a=nn.Linear(4, wide, bias), b=nn.Linear(wide, out)
        )
        return turn, (3, 4)
    if kind == "image":
        groups = r.choice([1, 2])
        conv = nn.Conv2d(2, 4, r.choice([1, 2, 3]), r.choice([1, 2]), r.choice([0, 1]), groups=groups, bias=bias)
        body = nn.Sequential(conv, act(), nn.GroupNorm(2, 4), nn.Conv2d(4, wide, 2, padding=1), act())
        head = nn.Linear(wide, out)
        return Fn(lambda m, x: m.h(m.b(x).mean((2, 3))), b=body, h=head), (2, 5, 5)
    if kind == "line":
        conv = nn.Conv1d(2, 4, 3, r.choice([1, 2]), r.choice([0, 1, 2]), r.choice([1, 2]), bias=bias)
        return Fn(lambda m, x: m.h(m.c(x).tanh().mean(2)), c=conv, h=nn.Linear(4, out)), (2, 7)
    if kind == "twice":
        return Fn(lambda m, x: m.h(m.l(m.l(x).tanh()) - m.l(x)), l=nn.Linear(4, 4, bias), h=nn.Linear(4, out)), (4,)
    conv = nn.ConvTranspose2d(2, 3, 2, r.choice([1, 2]), bias=bias)
    return Fn(lambda m, x: m.h(m.c(x).tanh().mean((2, 3))), c=conv, h=nn.Linear(3, out)), (2, 3, 3)


def options_of(r, method):
    """Options for the optimiser and its twin."""
    o = {"lr": r.choice([0.01, 0.1]), "momentum": r.choice([0.0, 0.9])}
    o["weight_decay"] = r.choice([0.0, 0.01])
    if o["weight_decay"] and r.random() < 0.5:
        o["decoupled_weight_decay"] = True
    if o["momentum"] and r.random() < 0.3:
        o["nesterov"] = True
    if method == "Shampoo":
        o |= {"block": r.choice([2, 3, 128]), "epsilon": r.choice([1e-2, 1e-4]), "decay": r.choice([1.0, 0.9])}
        o |= {"statistics_every": r.choice([1, 2]), "inverse_every": r.choice([1, 2, 4]), "graft": r.random() < 0.7}
        return o
    o["reduction"] = r.choice(["mean", "mean", "sum"])
    o["kl_clip"] = r.choice([None, 1e-3, 1e-5])
    if method in ("NGD", "FNGD"):
        o["scale"] = r.choice(["absorb", "per_layer", "graft"])
        o |= {"alpha": None, "damping": r.choice([0.1, 1.0])} if r.random() < 0.4 else {"alpha": r.choice([1e-3, 1e-1])}
        o["gram"] = r.choice(["layer", "layer", "network"])
        o["fisher"] = r.choice(["empirical", "empirical", "improved"])
        if method == "FNGD":
            o["share"] = r.choice(["position", "position", "sample"])
            o["refresh_epochs"] = r.choice([None, None, 2])
            o["control"] = r.choice([None, None, None, "constant"])
        return o
    o["damping"] = r.choice([0.03, 0.3])
    if method == "KFAC":
        o |= {"inverse": r.choice(["eigen", "cholesky"]), "inverse_every": r.choice([1, 2])}
    if method == "SKFAC":
        o |= {"positions": r.choice(["sum", "mean", "subsample"]), "keep": 100, "every": r.choice([1, 2])}
    else:
        o |= {"statistics_every": r.choice([1, 2]), "average": r.choice([0.0, 0.5, 0.95])}
        if method == "KFAC":  # inverses are made when there are new statistics
            o["inverse_every"] = o["statistics_every"] * r.choice([1, 2])
    return o


def losses(outputs, targets):
    """Cross-entropy of each sample."""
    return F.cross_entropy(outputs, targets, reduction="none")


def run(seed, steps=8):
    """Returns (steps compared, what is wrong or an empty string) of a training run."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    method = METHODS[seed % len(METHODS)]
    o = options_of(r, method)
    model, shape = model_of(r)
    model = model.double()
    passes = 2 if r.random() < 0.3 and o.get("share") != "sample" else 1
    if passes > 1:
        o["kl_clip"] = None if method in ("NGD", "FNGD") else o.get("kl_clip")
        if method in ("NGD", "FNGD"):
            o["accumulate"] = r.choice(["separate", "joint"])
        if method == "Shampoo":
            del o["kl_clip"]
    per_epoch = r.choice([1, 2, 3])
    sizes = [r.choice([1, 2, 3, 4, 5]) if r.random() < 0.3 else 4 for _ in range(per_epoch)]
    where = f"seed {seed} {method} {o} passes={passes} {type(model).__name__}"
    tokens = isinstance(model, nn.Sequential) and isinstance(model[0], nn.Embedding)
    draw = (
        (lambda n: torch.randint(6, (n, *shape))) if tokens else lambda n: torch.randn(n, *shape, dtype=torch.float64)
    )
    twin = (
        Natural(model, losses, o, per_epoch if method == "FNGD" else None)
        if method in ("NGD", "FNGD")
        else getattr(dense, method)(model, losses, o)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*preconditions")  # little of the model: says so
        optimizer = made(method, model, o, per_epoch, sum(sizes))
        for step in range(steps):
            place = step % per_epoch
            batches = [(draw(sizes[place]), torch.randint(3, (sizes[place],))) for _ in range(passes)]
            if o.get("share") == "sample":
                first = sum(sizes[:place])
                ids = torch.arange(first, first + sizes[place])[torch.randperm(sizes[place])]
                optimizer.next_batch(ids)
                twin.ids = ids.tolist()
            for x, t in batches:
                loss = losses(model(x), t)
                (loss.mean() / passes if o.get("reduction", "mean") == "mean" else loss.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            twin.step(batches)
            fault = difference(model, twin.model)
            if fault:
                return step, f"{where}, step {step}: {fault}"
    return steps, ""


def made(method, model, o, per_epoch, samples):
    """The optimiser."""
    options = dict(o)
    if method == "Shampoo":
        return fngd.Shampoo(model.parameters(), **options)
    if method == "FNGD":
        options |= {"steps_per_epoch": per_epoch}
        if o["share"] == "sample":
            options["samples"] = samples
    return getattr(fngd, method)(model, **options)


def difference(model, twin, tolerance=1e-8):
    """The first parameter that differs."""
    theirs = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        error = (p - theirs[name]).abs().max().item() / (1e-3 + theirs[name].abs().max().item())
        if not error <= tolerance:
            return f"{name} off by {error:.1e}"
    return ""
