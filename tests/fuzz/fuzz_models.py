"""Random models, batches with an unusual sample, and losses: `draw(seed)` makes all of it from one number."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import fuzz_images  # noqa: F401 - registers its families, as do the others
import fuzz_routing  # noqa: F401
import fuzz_sequences  # noqa: F401
import fuzz_vectors  # noqa: F401
import torch
from fuzz_families import FAMILIES
from torch import nn
from torch.nn import functional as F

UNUSUAL = ("none", "none", "nan", "nan entry", "inf entry", "zero", "duplicate", "huge", "tiny")


class Chain(nn.Module):
    """Pieces in sequence; the input may come with tokens, [B, T]: a table for them is the first piece."""

    def __init__(self, pieces, tokens=None, time_first=False):
        super().__init__()
        self.pieces, self.tokens, self.time_first = nn.ModuleList(pieces), tokens, time_first

    def forward(self, x, tokens=None):
        if self.time_first:
            x = x.transpose(0, 1)
        if tokens is not None:
            x = x + self.tokens(tokens)
        elif self.tokens is not None:
            x = self.tokens(x)
        for piece in self.pieces:
            x = piece(x)
        return x


@dataclass
class Drawn:
    """What `draw` made: `per_sample(model, loss_fn, inputs, targets)`, with sample b alone by `alone(b)`."""

    seed: int
    model: nn.Module
    loss_fn: Any
    inputs: Any
    targets: Any
    batch: int
    families: tuple[str, ...]
    unusual: str
    which: int  # the unusual sample
    axis: int = 0
    notes: list[str] = field(default_factory=list)

    def alone(self, b):
        """Inputs and targets of sample b."""

        def cut(value, axis):
            return None if value is None else value.narrow(axis, b, 1)

        if isinstance(self.inputs, tuple):
            inputs = tuple(cut(value, 0) for value in self.inputs)
        elif isinstance(self.inputs, dict):
            inputs = {name: cut(value, 0) for name, value in self.inputs.items()}
        else:
            inputs = cut(self.inputs, self.axis)
        return inputs, cut(self.targets, 0)

    def outputs(self, inputs):
        """The model's output."""
        if isinstance(inputs, tuple):
            return self.model(*inputs)
        return self.model(**inputs) if isinstance(inputs, dict) else self.model(inputs)

    def losses(self, inputs, targets):
        """The losses of some samples."""
        return self.loss_fn(self.outputs(inputs), targets)


LOSSES = {
    "square": lambda y, t: y.square().flatten(1).sum(1),
    "tanh": lambda y, t: y.tanh().flatten(1).mean(1),
    "sum": lambda y, t: y.flatten(1).sum(1),
    "targets": lambda y, t: (y.flatten(1) * t[:, None]).sigmoid().sum(1),
    "log": lambda y, t: (1 + y.square()).log().flatten(1).sum(1),
    "softmax": lambda y, t: F.log_softmax(y.flatten(1), 1)[:, 0],
}


def draw(seed):
    """Returns the model, loss and batch that belong to a seed; everything is float64."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return _draw(seed, r)
    finally:
        torch.set_default_dtype(before)


def _draw(seed, r):
    batch = r.choice([1, 2, 3, 3, 4, 4, 5, 6, 7] + [35] * (r.random() < 0.1))
    rank = r.choice([1, 1, 2, 2, 2, 3, 3, 4])
    size = {1: (4,), 2: (3, 4), 3: (2, 4, 4), 4: (2, 2, 3, 3)}[rank]
    shape = tuple(r.choice([s, s, batch if batch < 8 else s]) for s in size)
    if rank > 2:
        shape = (size[0], *shape[1:])
    start, tokens, names = shape, None, []
    kind = r.choice(["plain", "plain", "plain", "tokens", "pair", "dict", "time first"]) if rank == 2 else "plain"
    if kind in ("tokens", "pair", "dict"):
        tokens = nn.Embedding(6, shape[1])
        names.append(f"embedding of {kind}")
    pieces = []
    for _ in range(r.randint(1, 4)):
        name = r.choice(sorted(FAMILIES[len(shape)]))
        piece, shape = FAMILIES[len(shape)][name](r, shape)
        names.append(name)
        pieces.append(piece)
        if r.random() < 0.4:
            pieces.append(r.choice([nn.Tanh(), nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Softplus()]))
    if r.random() < 0.1:
        pieces.append(pieces[0]) if tokens is None and _fits(pieces, shape, start) else None
    x, ids = torch.randn(batch, *start), torch.randint(6, (batch, start[0]))
    unusual = r.choice(UNUSUAL)
    which = r.randrange(batch)
    targets = torch.randn(batch)
    make_unusual(x, ids, targets, unusual, which)
    inputs = {
        "plain": x, "tokens": ids, "pair": (x, ids), "dict": {"x": x, "tokens": ids}, "time first": x.transpose(0, 1),
    }[kind]  # fmt: skip
    loss = r.choice(sorted(LOSSES))
    model = Chain(pieces, tokens, kind == "time first")
    if r.random() < 0.15:  # parameters that no loss depends on, and frozen ones
        model.unused = nn.Parameter(torch.randn(()))
    if r.random() < 0.15 and len(list(model.parameters())) > 1:
        next(iter(model.parameters())).requires_grad_(False)
    names.append(f"loss {loss}")
    axis = 1 if kind == "time first" else 0
    return Drawn(seed, model, LOSSES[loss], inputs, targets, batch, tuple(names), unusual, which, axis)


def _fits(pieces, shape, start):
    return shape == start


def make_unusual(x, ids, targets, unusual, which):
    """Changes one sample in place."""
    if unusual == "nan":
        x[which] = float("nan")
    elif unusual == "nan entry":
        x[which].view(-1)[-1] = float("nan")
    elif unusual == "inf entry":
        x[which].view(-1)[0] = float("inf")
    elif unusual == "zero":
        x[which] = 0
    elif unusual == "huge":
        x[which] *= 1e20
    elif unusual == "tiny":
        x[which] *= 1e-20
    elif unusual == "duplicate":
        for tensor in (x, ids, targets):
            tensor[which] = tensor[0].clone()
