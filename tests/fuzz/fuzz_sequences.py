"""Families of pieces of models that take a sequence for each sample, [B, T, D]; see `fuzz_models`."""

from __future__ import annotations

import torch
from fuzz_families import Fn, family, same, weights
from fuzz_vectors import Doubled
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint


@family(2)
def seq_linear(r, shape):
    out = r.randint(1, 4)
    return nn.Linear(shape[1], out, bias=r.random() < 0.7), (shape[0], out)


@family(2)
def seq_norm(r, shape):
    over = shape if r.random() < 0.3 else shape[1:]
    module = nn.LayerNorm(over) if r.random() < 0.6 else nn.RMSNorm(over, eps=1e-3)
    return module, shape


@family(2)
def recurrent(r, shape):
    kind, both, layers = r.choice([nn.LSTM, nn.GRU, nn.RNN]), r.random() < 0.3, r.randint(1, 2)
    first = r.random() < 0.6
    rnn = kind(shape[1], 2, layers, batch_first=first, bidirectional=both)

    def forward(m, x):
        return m.rnn(x)[0] if first else m.rnn(x.transpose(0, 1))[0].transpose(0, 1)

    return Fn(forward, rnn=rnn), (shape[0], 4 if both else 2)


@family(2)
def packed(r, shape):
    lengths = [r.randint(1, shape[0]) for _ in range(64)]

    def forward(m, x):
        given = torch.tensor(lengths)[(x[:, 0, 0].detach().nan_to_num(0).clamp(-9, 9) * 5).long() % 64]
        rows = pack_padded_sequence(x, given, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(m.rnn(rows)[0], batch_first=True, total_length=shape[0])[0]

    return Fn(forward, rnn=nn.GRU(shape[1], 2, batch_first=True)), (shape[0], 2)


@family(2)
def cell(r, shape):
    kind = r.choice([nn.GRUCell, nn.RNNCell])

    def forward(m, x):
        h = m.start.expand(len(x), -1)
        for t in range(shape[0]):
            h = m.cell(x[:, t], h)
        return h

    return Fn(forward, cell=kind(shape[1], 2), start=weights(2)), (2,)


@family(2)
def multihead(r, shape):
    first, causal = r.random() < 0.6, r.random() < 0.4

    def forward(m, x):
        y = x if first else x.transpose(0, 1)
        mask = torch.triu(torch.ones(shape[0], shape[0], dtype=torch.bool), 1) if causal else None
        y = m.a(y, y, y, attn_mask=mask, need_weights=r_weights)[0]
        return y if first else y.transpose(0, 1)

    r_weights = r.random() < 0.5
    heads = 2 if shape[1] % 2 == 0 else 1
    return same(shape, forward, a=nn.MultiheadAttention(shape[1], heads, batch_first=first))


@family(2)
def cross_attention(r, shape):
    def forward(m, x):  # learnt queries
        return m.a(m.q.expand(len(x), -1, -1), x, x)[0]

    n = r.randint(1, 3)
    return Fn(forward, a=nn.MultiheadAttention(shape[1], 1, batch_first=True), q=weights(n, shape[1])), (n, shape[1])


@family(2)
def dot_product_attention(r, shape):
    def forward(m, x):
        q, k, v = m.l(x).chunk(3, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    causal = r.random() < 0.5
    return same(shape, forward, l=nn.Linear(shape[1], 3 * shape[1]))


@family(2)
def encoder_layer(r, shape):
    layer = nn.TransformerEncoderLayer(shape[1], 1, 3, dropout=0.0, batch_first=True, norm_first=r.random() < 0.5)
    return layer, shape


@family(2)
def convolved(r, shape):
    out = 2 * r.randint(1, 2)
    groups = 2 if shape[1] % 2 == 0 and r.random() < 0.4 else 1
    mode = r.choice(["zeros", "circular"])
    conv = nn.Conv1d(shape[1], out, 3, padding=1, groups=groups, padding_mode=mode)
    return Fn(lambda m, x: m.c(x.transpose(1, 2)).transpose(1, 2), c=conv), (shape[0], out)


@family(2)
def transposed_1d(r, shape):
    conv = nn.ConvTranspose1d(shape[1], 2, 3, stride=r.randint(1, 2), padding=1)
    length = (shape[0] - 1) * conv.stride[0] + 1
    return Fn(lambda m, x: m.c(x.transpose(1, 2)).transpose(1, 2), c=conv), (length, 2)


@family(2)
def positions(r, shape):
    return same(shape, lambda m, x: x + m.p(torch.arange(shape[0])), p=nn.Embedding(shape[0], shape[1]))


@family(2)
def positions_of_batch(r, shape):
    return same(shape, lambda m, x: x * m.p.expand(len(x), -1, -1) + m.p, p=weights(*shape))


@family(2)
def embedded(r, shape):
    n = r.randint(2, 6)

    def forward(m, x):
        return m.e((x.detach().nan_to_num(0).clamp(-9, 9) * 4).long() % n).sum(2) + x.sum(2, keepdim=True)

    pad = 0 if r.random() < 0.3 else None
    return Fn(forward, e=nn.Embedding(n, 2, padding_idx=pad, scale_grad_by_freq=False)), (shape[0], 2)


@family(2)
def bagged(r, shape):
    n, mode = r.randint(2, 6), r.choice(["sum", "mean", "max"])

    def forward(m, x):
        return m.e((x[:, :, 0].detach().nan_to_num(0).clamp(-9, 9) * 4).long() % n) * x.mean((1, 2))[:, None]

    return Fn(forward, e=nn.EmbeddingBag(n, 2, mode=mode)), (2,)


@family(2)
def seq_tied(r, shape):
    return same(shape, lambda m, x: torch.tanh(x @ m.w.T) @ m.w, w=weights(2, shape[1]))


@family(2)
def mixer(r, shape):
    def forward(m, x):
        x = x + m.t(x.transpose(1, 2)).transpose(1, 2)
        return x + m.d(x)

    return same(shape, forward, t=nn.Linear(shape[0], shape[0]), d=nn.Linear(shape[1], shape[1]))


@family(2)
def flattened_batch(r, shape):
    return same(shape, lambda m, x: m.l(x.flatten(0, 1)).view(len(x), *shape), l=nn.Linear(shape[1], shape[1]))


@family(2)
def time_major(r, shape):
    return same(shape, lambda m, x: m.l(x.transpose(0, 1)).transpose(0, 1), l=nn.Linear(shape[1], shape[1]))


@family(2)
def masked_positions(r, shape):
    def forward(m, x):
        chosen = x[:, :, 0] > 0
        out = x * 1
        out[chosen] = m.l(x[chosen])
        return out

    return same(shape, forward, l=nn.Linear(shape[1], shape[1]))


@family(2)
def token_experts(r, shape):
    def forward(m, x):
        tokens = x.flatten(0, 1)
        scores, chosen = (tokens @ m.gate).softmax(1).topk(2, 1)
        out = torch.zeros_like(tokens)
        for k in range(3):
            rows, slot = (chosen == k).nonzero(as_tuple=True)
            out.index_add_(0, rows, scores[rows, slot, None] * torch.tanh(tokens[rows] @ m.w[k]))
        return out.view_as(x)

    return same(shape, forward, gate=weights(shape[1], 3), w=weights(3, shape[1], shape[1]))


@family(2)
def batched_matrices(r, shape):
    out = r.randint(1, 3)
    return Fn(lambda m, x: torch.einsum("btd,tdo->bto", x, m.w), w=weights(*shape, out)), (shape[0], out)


@family(2)
def decayed(r, shape):
    def forward(m, x):  # a linear recurrence by cumulated sums
        a = m.a.sigmoid().log() * torch.arange(shape[0], dtype=x.dtype)[:, None]
        return (x * (-a).exp()).cumsum(1) * a.exp()

    return same(shape, forward, a=weights(shape[1]))


@family(2)
def rotated(r, shape):
    return same(shape, lambda m, x: x * m.p.cos() + x.roll(1, 2) * m.p.sin(), p=weights(*shape))


@family(2)
def seq_custom(r, shape):
    return same(shape, lambda m, x: Doubled.apply(x.flatten(0, 1), m.w).view_as(x), w=weights(shape[1], shape[1]))


@family(2)
def seq_checkpointed(r, shape):
    body = nn.Sequential(nn.LayerNorm(shape[1]), nn.Linear(shape[1], shape[1]))
    return same(shape, lambda m, x: checkpoint(m.body, x, use_reentrant=False), body=body)


@family(2)
def seq_parametrised(r, shape):
    return parametrizations.weight_norm(nn.Linear(shape[1], 2), dim=None if r.random() < 0.3 else 0), (shape[0], 2)


@family(2)
def unrolled(r, shape):
    def forward(m, x):
        h = x.new_zeros(len(x), 2)
        out = []
        for step in x.unbind(1):
            h = torch.tanh(m.i(step) + m.h(h))
            out.append(h)
        return torch.stack(out, 1)

    return Fn(forward, i=nn.Linear(shape[1], 2), h=nn.Linear(2, 2, bias=False)), (shape[0], 2)


@family(2)
def differences(r, shape):
    return Fn(lambda m, x: m.l(x[:, 0]) - m.l(x[:, -1]), l=nn.Linear(shape[1], 3)), (3,)


@family(2)
def pooled(r, shape):
    kind = r.choice(["mean", "sum", "max", "last", "weighted", "logsumexp"])
    ways = {
        "mean": lambda m, x: x.mean(1) * m.p,
        "sum": lambda m, x: (x * m.p).sum(1),
        "max": lambda m, x: (x * m.p).amax(1) if shape[0] == 1 else (x * m.p).max(1).values,
        "last": lambda m, x: x[:, -1] * m.p,
        "weighted": lambda m, x: ((x @ m.p).softmax(1).unsqueeze(1) @ x).squeeze(1),
        "logsumexp": lambda m, x: (x * m.p).logsumexp(1),
    }
    return Fn(ways[kind], p=weights(shape[1]) + 1), (shape[1],)


@family(2)
def flattened(r, shape):
    return Fn(lambda m, x: m.l(x.flatten(1)), l=nn.Linear(shape[0] * shape[1], 3)), (3,)


@family(2)
def pairs(r, shape):
    def forward(m, x):
        return torch.einsum("btd,de,bse->bts", x, m.w, x)

    return Fn(forward, w=weights(shape[1], shape[1])), (shape[0], shape[0])
