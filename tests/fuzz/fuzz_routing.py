"""Families of pieces of models that choose rows, entries or experts by index or by data, [B, D]; see `fuzz_models`."""

from __future__ import annotations

import torch
from fuzz_families import Fn, family, same, weights
from torch import nn


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
