"""Models in float32 in which positions or uses of a sample nearly cancel: `draw(seed)` makes one, with a batch."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import torch
from fuzz_families import Fn
from torch import nn
from torch.nn import functional as F

import persample

KINDS = {}


def kind(make):
    """Registers `make(r, size, positions) -> (module, shape of a sample, its axis of features)`."""
    KINDS[make.__name__] = make
    return make


def contrast(y):
    """Σ_t ±y_t over dimension 1, signs adding up to zero but for a last odd one."""
    signs = torch.ones(y.shape[1], dtype=y.dtype)
    signs[1::2] = -1
    if y.shape[1] % 2:
        signs[-1] = 0
    return torch.einsum("t,bt...->b...", signs, y)


@kind
def positions(r, size, count):
    return Fn(lambda m, x: contrast(m.l(x)), l=nn.Linear(size, size, bias=r.random() < 0.5)), (count, size)


@kind
def uses(r, size, count):
    def forward(m, x):
        return sum((-1) ** t * m.l(x[:, t]) for t in range(2 * (count // 2)))

    return Fn(forward, l=nn.Linear(size, size, bias=r.random() < 0.5)), (count, size)


@kind
def uses_of_positions(r, size, count):
    def forward(m, x):  # two sequences, shared weight
        return m.l(x).sum(1) - m.l(x.roll(1, 0) * 0 + x.flip(1) + 0.01 * x).sum(1)

    return Fn(forward, l=nn.Linear(size, size)), (count, size)


@kind
def saturated(r, size, count):
    return Fn(lambda m, x: contrast(m.l(x)).tanh(), l=nn.Linear(size, size)), (count, size)


@kind
def two_layers(r, size, count):
    return Fn(lambda m, x: m.b(contrast(m.a(x)).tanh()), a=nn.Linear(size, size), b=nn.Linear(size, 3)), (count, size)


@kind
def bare(r, size, count):
    return Fn(lambda m, x: contrast(torch.einsum("bti,io->bto", x, m.w)), w=torch.randn(size, size)), (count, size)


@kind
def tied(r, size, count):
    return Fn(lambda m, x: contrast(F.linear(F.linear(x, m.w), m.w.T)), w=torch.randn(size, size) / size), (count, size)


@kind
def convolved(r, size, count):
    conv = nn.Conv1d(size, size, r.choice([1, 2, 3]), padding=1, groups=r.choice([1, 1, 2]), bias=r.random() < 0.5)
    return Fn(lambda m, x: contrast(m.c(x.transpose(1, 2)).transpose(1, 2)), c=conv), (count, size)


@kind
def images(r, size, count):
    channels = max(2, size // 8)
    conv = nn.Conv2d(channels, channels, r.choice([1, 3]), padding=1, bias=r.random() < 0.5)
    return Fn(lambda m, x: contrast(m.c(x).flatten(2).transpose(1, 2)), c=conv), (channels, count, count)


@kind
def transposed(r, size, count):
    conv = nn.ConvTranspose1d(size, size, 2, stride=r.choice([1, 2]))
    return Fn(lambda m, x: contrast(m.c(x.transpose(1, 2)).transpose(1, 2)), c=conv), (count, size)


@kind
def normalised_images(r, size, count):
    channels = max(2, size // 8)
    conv, norm = nn.Conv2d(channels, channels, 1), nn.GroupNorm(channels, channels)
    return Fn(lambda m, x: m.n(m.c(x)).flatten(1).tanh(), c=conv, n=norm), (channels, count + 1, count + 1)


@kind
def normalised(r, size, count):
    return Fn(lambda m, x: contrast(m.n(m.l(x))), l=nn.Linear(size, size), n=nn.LayerNorm(size)), (count, size)


@kind
def attention(r, size, count):
    attend = nn.MultiheadAttention(size, 2, batch_first=True, bias=r.random() < 0.7)
    return Fn(lambda m, x: contrast(m.a(x, x, x, need_weights=False)[0]), a=attend), (count, size)


@kind
def keys(r, size, count):
    def forward(m, x):  # the gradients of attention scores add up to zero over the positions
        scores = torch.softmax(m.k(x) @ m.q / size**0.5, 1)
        return torch.einsum("bt,btd->bd", scores, x - x.mean(1, keepdim=True))

    return Fn(forward, k=nn.Linear(size, size, bias=False), q=torch.randn(size) / size), (count, size)


@kind
def table(r, size, count):
    def forward(m, x):
        ids = torch.arange(2 * (count // 2)) // 2 % 2
        return contrast(m.e(ids)[None] * x[:, : len(ids)])

    return Fn(forward, e=nn.Embedding(2, size)), (count, size)


@dataclass
class Drawn:
    """A model in float32 with a batch, and how it was made."""

    seed: int
    kind: str
    model: nn.Module
    x: torch.Tensor
    offset: float
    linear: bool  # the loss

    def losses(self, model, x):
        """The losses, [B]."""
        y = model(x).flatten(1)
        return y.sum(1) if self.linear else (y * 0.1).sin().sum(1)


def draw(seed):
    """Returns the model and batch of a seed."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    name = sorted(KINDS)[seed % len(KINDS)]
    module, shape = KINDS[name](r, r.choice([16, 32, 64]), r.choice([2, 2, 3, 4]))
    offset = 10 ** r.uniform(0, 6)
    batch = r.randint(2, 5)
    common = torch.randn(batch, *((shape[0], 1, 1) if len(shape) == 3 else (1, shape[1])))
    x = offset * common + torch.randn(batch, *shape)
    return Drawn(seed, name, module, x, offset, r.random() < 0.6)


def loop(drawn, double):
    """Rows [B, N] in float64, computed one sample at a time in float32 or float64."""
    model, x = (copy.deepcopy(drawn.model).double(), drawn.x.double()) if double else (drawn.model, drawn.x)
    parameters = list(model.parameters())
    rows = []
    for b in range(len(x)):
        loss = drawn.losses(model, x[b : b + 1])[0]
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.double().flatten() for g in found]))
    return torch.stack(rows)


def relative(ours, true):
    """|ours − true| / true."""
    return (ours.double() - true).abs() / true


def judge(seed):
    """Returns what is wrong for a seed, refusals included: a list of sentences."""
    try:
        return faults_of(draw(seed))
    except persample.PerSampleError as error:
        return [f"seed {seed} {draw(seed).kind} refused: {error!r}"]


def faults_of(drawn, floor=2e-6):
    """Compares norms, Gram matrices and clipped sums with those of the loops."""
    seed = drawn.seed
    true, single = loop(drawn, True), loop(drawn, False)
    norms = true.norm(dim=1)
    if not bool((norms > 0).all()):
        return []
    r = random.Random(seed + 1)
    # What the float32 loop is off by: of the rows as vectors too, or luck in one number would set the bar.
    off = torch.maximum(relative(single.norm(dim=1), norms), (single - true).norm(dim=1) / norms).max().item()
    allowed = 10 * off + floor
    options: dict[str, Any] = r.choice([{"hold": "factors"}, {"hold": "graph"}, {"chunk_size": 1}, {"chunk_size": 2}])

    def loss(y, _):
        y = y.flatten(1)
        return y.sum(1) if drawn.linear else (y * 0.1).sin().sum(1)

    faults, where = [], f"seed {seed} {drawn.kind} offset {drawn.offset:.1e} linear={drawn.linear} {options}"
    psg = persample.per_sample(drawn.model, loss, drawn.x, **options)
    scale = norms[:, None] * norms
    results = {
        "norms": relative(psg.norms(), norms).max().item(),
    }
    for name, gram in (("gram", psg.gram()), ("gram other", psg.gram(other=psg))):
        error = ((gram.double() - true @ true.T).abs() / scale).max().item()
        results[name] = max((1 + error) ** 0.5 - 1 - 8e-6, 0)  # (1 + e)² − 1 is what an error of e in both rows makes
    own = reweighted_norms(drawn)
    if own is not None:
        results["reweight norms"] = relative(own, norms).max().item()
    if off > 0.1:  # the loop itself has no digits: nothing to be compared with, but the bound must hold
        results = {}
    faults += [
        f"{where}: {name} off by {e:.1e}, the loop by {off:.1e}" for name, e in results.items() if not e <= allowed
    ]
    for b in range(len(drawn.x)):
        bound = single[b].norm().item() * r.choice([0.01, 0.3, 0.9])
        if not bound > 1e-30:
            continue
        alone = persample.per_sample(drawn.model, loss, drawn.x[b : b + 1], hold=options.get("hold", "factors"))
        length = torch.cat([g.double().flatten() for g in alone.clipped_sum(bound).values()]).norm().item()
        if not length <= bound * (1 + 1e-5):
            faults.append(f"{where}: clipped sum of sample {b} is {length / bound:.6f} of its bound")
    return faults


def reweighted_norms(drawn):
    """‖g_b‖ by `reweight`, of models that are one layer; None for others."""
    layers = [m for m in drawn.model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d))]
    if len(layers) != 1 or len(list(layers[0].parameters())) != len(list(drawn.model.parameters())):
        return None
    seen = []
    with persample.reweight(drawn.model, lambda layer, grads: seen.append(grads.norms())):
        drawn.losses(drawn.model, drawn.x).sum().backward()
    drawn.model.zero_grad()
    return seen[0] if len(seen) == 1 else None
