"""Families of pieces of models that take a vector for each sample, [B, D]; see `fuzz_models`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

FAMILIES = {1: {}, 2: {}, 3: {}, 4: {}}  # dimensions beside the batch's -> name -> function


def family(rank):
    """Registers `make(r, shape) -> (module, shape of its output)` for inputs [B, *shape] of `rank` dimensions."""

    def register(make):
        FAMILIES[rank][make.__name__] = make
        return make

    return register


class Fn(nn.Module):
    """A forward function with the parameters and modules that it uses."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, x):
        return self.function(self, x)


def weights(*shape, scale=0.5):
    """A random tensor for a parameter."""
    return scale * torch.randn(shape)


def same(shape, forward, **parts):
    """A piece whose output has the shape of its input."""
    return Fn(forward, **parts), shape


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
def gathered(r, shape):
    return same(shape, lambda m, x: (m.p + x).gather(1, x.detach().argsort(1)), p=weights(*shape))


@family(1)
def gathered_table(r, shape):
    n = r.randint(1, 5)

    def forward(m, x):
        return m.p[(x.detach().nan_to_num(0).clamp(-9, 9) * 3).long() % n] + x

    return same(shape, forward, p=weights(n))


@family(1)
def scattered(r, shape):
    def forward(m, x):
        return torch.zeros_like(x).scatter(1, x.detach().argsort(1), x * m.p)

    return same(shape, forward, p=weights(*shape))


@family(1)
def index_added(r, shape):
    def forward(m, x):  # every sample's row, in another order and back
        order = x[:, 0].detach().argsort()
        return torch.zeros_like(x).index_add(0, order, (x * m.p)[order])

    return same(shape, forward, p=weights(*shape))


@family(1)
def index_selected(r, shape):
    def forward(m, x):
        order = torch.arange(len(x) - 1, -1, -1)
        return m.l(x.index_select(0, order)).index_select(0, order)

    return same(shape, forward, l=nn.Linear(*shape, *shape))


@family(1)
def sorted_by_data(r, shape):
    def forward(m, x):
        order = x[:, 0].detach().argsort()
        return m.l(x[order])[order.argsort()]

    return same(shape, forward, l=nn.Linear(*shape, *shape))


@family(1)
def sorted_features(r, shape):
    return same(shape, lambda m, x: (x + m.p).sort(1).values * m.p, p=weights(*shape))


@family(1)
def where(r, shape):
    return same(shape, lambda m, x: torch.where(x > 0, x * m.p, m.q), p=weights(*shape), q=weights(*shape))


@family(1)
def masked_fill(r, shape):
    return same(shape, lambda m, x: (x * m.p).masked_fill(x.detach() > 1, 0.5) + m.p, p=weights(*shape))


@family(1)
def concatenated(r, shape):
    module = Fn(lambda m, x: torch.cat([x * m.p, m.q.expand(len(x), -1), x], 1), p=weights(*shape), q=weights(2))
    return module, (2 * shape[0] + 2,)


@family(1)
def stacked(r, shape):
    return same(shape, lambda m, x: torch.stack([x, x * m.p, m.q.expand_as(x)]).prod(0), p=weights(*shape), q=weights())


@family(1)
def split_weights(r, shape):
    def forward(m, x):
        a, b = m.w.split([shape[0], 2])
        first, second = b.unbind()
        return (x @ a.chunk(2, 1)[0]) * first[0] + second.sum()

    return Fn(forward, w=weights(shape[0] + 2, 4)), (2,)


@family(1)
def own_weights(r, shape):
    def forward(m, x):  # a matrix for each sample, computed from it
        return torch.bmm(m.l(torch.tanh(x)).unflatten(1, (-1, shape[0])), x.unsqueeze(2)).squeeze(2)

    out = r.randint(1, 3)
    return Fn(forward, l=nn.Linear(*shape, out * shape[0])), (out,)


@family(1)
def cdist(r, shape):
    out = r.randint(1, 4)
    return Fn(lambda m, x: torch.cdist(x, m.p), p=weights(out, *shape)), (out,)


@family(1)
def memory(r, shape):
    def forward(m, x):  # attention over learnt keys and values
        return torch.softmax(x @ m.k.T, 1) @ m.v

    n, out = r.randint(1, 4), r.randint(1, 4)
    return Fn(forward, k=weights(n, *shape), v=weights(n, out)), (out,)


@family(1)
def logsumexp(r, shape):
    out = r.randint(1, 4)
    return Fn(lambda m, x: (x.unsqueeze(1) + m.p).logsumexp(2), p=weights(out, *shape)), (out,)


@family(1)
def top_features(r, shape):
    k = r.randint(1, shape[0])
    return Fn(lambda m, x: (x * m.p).topk(k, 1).values, p=weights(*shape)), (k,)


@family(1)
def experts(r, shape):
    def forward(m, x):
        out = x.new_zeros(len(x), 2)
        for k, expert in enumerate(m.e):
            mine = (x[:, 0] > 0) == bool(k)
            out[mine] = expert(x[mine])
        return out

    return Fn(forward, e=nn.ModuleList(nn.Linear(*shape, 2) for _ in range(2))), (2,)


@family(1)
def top_experts(r, shape):
    def forward(m, x):
        scores, chosen = m.gate(x).softmax(1).topk(2, 1)
        out = torch.zeros(len(x), 2, dtype=x.dtype)
        for k in range(3):
            rows, slot = (chosen == k).nonzero(as_tuple=True)
            out = out.index_add(0, rows, scores[rows, slot, None] * (x[rows] @ m.w[k]))
        return out

    return Fn(forward, gate=nn.Linear(*shape, 3), w=weights(3, *shape, 2)), (2,)


@family(1)
def picked_weights(r, shape):
    def forward(m, x):  # a matrix for each sample, from a table
        return torch.einsum("bi,bio->bo", x, m.w[(x[:, -1] > 0).long()])

    return Fn(forward, w=weights(2, *shape, 2)), (2,)


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
