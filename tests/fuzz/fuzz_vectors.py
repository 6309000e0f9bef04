"""Families of pieces of models that take a vector for each sample, [B, D]; see `fuzz_models`."""

from __future__ import annotations

import torch
from fuzz_families import Fn, family, same, weights
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


@family(1)
def linear(r, shape):
    out = r.randint(1, 5)
    return nn.Linear(*shape, out, bias=r.random() < 0.7), (out,)


@family(1)
def mul(r, shape):
    return same(shape, lambda m, x: x * m.p, p=weights(*shape) + 1)


@family(1)
def add(r, shape):
    return same(shape, lambda m, x: x + m.p, p=weights(*shape))


@family(1)
def scalar(r, shape):
    return same(shape, lambda m, x: m.a * x + m.b, a=weights() + 1, b=weights())


@family(1)
def exponential(r, shape):
    return same(shape, lambda m, x: torch.tanh(x) * m.p.exp(), p=weights(*shape))


@family(1)
def power(r, shape):
    return same(shape, lambda m, x: (x.square() + 1).pow(m.p), p=weights(*shape, scale=0.2))


@family(1)
def normalised(r, shape):
    kind = r.choice(["layer", "rms", "group", "batch"])
    if kind == "batch":
        module = nn.BatchNorm1d(shape[0]).eval()
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    elif kind == "group":
        module = nn.GroupNorm(1, shape[0])
    else:
        module = (nn.LayerNorm if kind == "layer" else nn.RMSNorm)(shape[0], eps=1e-3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(weights(*p.shape))
    return module, shape


@family(1)
def weight_normed(r, shape):
    out = r.randint(1, 4)
    return parametrizations.weight_norm(nn.Linear(*shape, out)), (out,)


@family(1)
def spectrally_normed(r, shape):
    out = r.randint(2, 4)
    if shape[0] < 2:
        return linear(r, shape)
    return parametrizations.spectral_norm(nn.Linear(*shape, out)).eval(), (out,)


@family(1)
def tied(r, shape):
    return same(shape, lambda m, x: torch.tanh(x @ m.w.T) @ m.w, w=weights(r.randint(1, 4), *shape))


@family(1)
def called_twice(r, shape):
    return same(shape, lambda m, x: m.l(torch.tanh(m.l(x))) - m.l(x.flip(1)), l=nn.Linear(*shape, *shape))


@family(1)
def bilinear(r, shape):
    out = r.randint(1, 3)
    return Fn(lambda m, x: m.l(x.sin(), x), l=nn.Bilinear(*shape, *shape, out)), (out,)


@family(1)
def einsum(r, shape):
    out = r.randint(1, 4)
    return Fn(lambda m, x: torch.einsum("bi,oij,bj->bo", x.sin(), m.w, x), w=weights(out, *shape, *shape)), (out,)


@family(1)
def product_of_weights(r, shape):
    out, rank = r.randint(1, 4), r.randint(1, 3)
    return Fn(lambda m, x: x @ (m.a @ m.b) + m.a.sum(), a=weights(*shape, rank), b=weights(rank, out)), (out,)


@family(1)
def cumulated(r, shape):
    return same(shape, lambda m, x: (x * m.p).cumsum(1) + m.p.cumsum(0), p=weights(*shape))


@family(1)
def prelu(r, shape):
    return nn.PReLU(shape[0] if r.random() < 0.5 else 1), shape


class Doubled(torch.autograd.Function):
    """x Wᵀ, twice."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return 2 * x @ w.T

    @staticmethod
    def backward(ctx, z):
        x, w = ctx.saved_tensors
        return 2 * z @ w, 2 * z.T @ x


@family(1)
def custom_function(r, shape):
    out = r.randint(1, 4)
    return Fn(lambda m, x: Doubled.apply(x, m.w), w=weights(out, *shape)), (out,)


@family(1)
def complex_weights(r, shape):
    def forward(m, x):
        y = torch.complex(x, x.sin()) @ m.w
        return torch.cat([y.real, y.imag], 1)

    return Fn(forward, w=torch.randn(*shape, 2, dtype=torch.complex128)), (4,)


@family(1)
def spectrum(r, shape):
    return same(shape, lambda m, x: torch.fft.fft(x * m.p).real + m.p, p=weights(*shape))


@family(1)
def checkpointed(r, shape):
    reentrant = r.random() < 0.3
    body = nn.Sequential(nn.Linear(*shape, 3), nn.Tanh(), nn.Linear(3, 2))
    if r.random() < 0.3:  # an operation without a rule of its own

        def segment(m, x):
            return torch.hypot(m.body(x) * (1 + m.q), m.p)

        return Fn(lambda m, x: checkpoint(segment, m, x, use_reentrant=False), body=body, p=weights(2), q=weights(2)), (
            2,
        )
    return Fn(lambda m, x: checkpoint(m.body, x, use_reentrant=reentrant and x.requires_grad), body=body), (2,)


@family(1)
def in_blocks(r, shape):
    def forward(m, x):  # parts of each sample folded into the batch
        return m.l(x.repeat(1, 2).reshape(-1, shape[0])).reshape(len(x), -1)

    out = r.randint(1, 3)
    return Fn(forward, l=nn.Linear(*shape, out)), (2 * out,)


@family(1)
def repeated(r, shape):
    def forward(m, x):  # all first copies, then all second ones
        return torch.cat(m.l(torch.cat([x, 2 * x])).chunk(2), 1)

    return Fn(forward, l=nn.Linear(*shape, 2)), (4,)


@family(1)
def rolled(r, shape):
    return same(shape, lambda m, x: (x.roll(1, 1) * m.p).roll(1, 1) + m.p.roll(1), p=weights(*shape))


@family(1)
def padded(r, shape):
    return Fn(lambda m, x: F.pad(x * m.p, (1, 0)) + F.pad(m.p, (0, 1)), p=weights(*shape)), (shape[0] + 1,)


@family(1)
def residual(r, shape):
    return same(shape, lambda m, x: x + m.l(torch.tanh(x)), l=nn.Linear(*shape, *shape))


@family(1)
def gated(r, shape):
    return same(shape, lambda m, x: F.glu(m.l(x), 1), l=nn.Linear(*shape, 2 * shape[0]))


@family(1)
def one_by_one(r, shape):
    return same(shape, lambda m, x: torch.stack([m.l(row) for row in x]), l=nn.Linear(*shape, *shape))


@family(1)
def in_place(r, shape):
    def forward(m, x):
        y = x * m.p
        y[:, 0] *= 2
        return y.add_(m.p).tanh_()

    return same(shape, forward, p=weights(*shape))


@family(1)
def solved(r, shape):
    def forward(m, x):
        return torch.linalg.solve(m.a @ m.a.T + torch.eye(shape[0], dtype=x.dtype), x.unsqueeze(2)).squeeze(2)

    return same(shape, forward, a=weights(*shape, *shape))


@family(1)
def as_sequence(r, shape):
    t = r.randint(1, 4)
    return Fn(lambda m, x: m.l(x).unflatten(1, (t, 3)), l=nn.Linear(*shape, 3 * t)), (t, 3)


@family(1)
def as_outer_product(r, shape):
    t = r.randint(2, 4)
    return Fn(lambda m, x: m.p[:, None] * x[:, None], p=weights(t)), (t, *shape)


@family(1)
def as_image(r, shape):
    return Fn(lambda m, x: m.l(x).unflatten(1, (2, 4, 4)), l=nn.Linear(*shape, 32)), (2, 4, 4)
