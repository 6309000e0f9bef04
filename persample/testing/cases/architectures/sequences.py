"""Recurrences, scans and convolutions over time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from persample.testing.cases.parts import heads
from persample.testing.cases.table import Built, Net, classify, group, ids, randn, regress

case = group("language", "architecture")
B, T, D, HEADS, VOCAB = 3, 5, 8, 2, 11


@case()
def mamba() -> Built:
    """A selective scan: causal depthwise convolution, steps by softplus, decay by -exp of a parameter, a
    loop.
    """
    state, inner = 3, 6

    def run(m: Net, tokens: Tensor) -> Tensor:
        x, gate = m.inp(m.words(tokens)).chunk(2, -1)
        x = F.silu(m.conv(x.mT)[..., : tokens.shape[1]].mT)
        dt, b, c = m.select(x).split([inner, state, state], -1)
        dt = F.softplus(dt + m.dt_bias)
        decay = torch.exp(dt[..., None] * -m.a_log.exp())
        h, ys = x.new_zeros(len(x), inner, state), []
        for t in range(tokens.shape[1]):
            h = decay[:, t] * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
            ys.append((h * c[:, t, None]).sum(-1))
        return m.head(m.out((torch.stack(ys, 1) + m.skip * x) * F.silu(gate)))

    model = Net(
        run,
        words=nn.Embedding(VOCAB, D),
        inp=nn.Linear(D, 2 * inner, bias=False),
        conv=nn.Conv1d(inner, inner, 3, padding=2, groups=inner),
        select=nn.Linear(inner, inner + 2 * state, bias=False),
        dt_bias=randn(inner),
        a_log=randn(inner, state),
        skip=randn(inner),
        out=nn.Linear(inner, D),
        head=nn.Linear(D, VOCAB),
    )
    return classify(model, ids(VOCAB, B, T))


@case()
def rwkv() -> Built:
    """Token shift with learned mixing, a decaying sum with a bonus for the present token, squared ReLU."""

    def run(m: Net, tokens: Tensor) -> Tensor:
        x = m.norm(m.words(tokens))
        before = F.pad(x, (0, 0, 1, -1))
        k, v, r = (
            lin(torch.lerp(before, x, mix.sigmoid()))
            for lin, mix in zip((m.k, m.v, m.r), (m.mix_k, m.mix_v, m.mix_r), strict=True)
        )
        top = bottom = torch.zeros_like(k[:, 0])
        ys = []
        for key, value in zip(k.unbind(1), v.unbind(1), strict=True):
            now = (m.bonus + key).exp()
            ys.append((top + now * value) / (bottom + now))
            top, bottom = (s * torch.exp(-m.decay.exp()) + key.exp() * u for s, u in ((top, value), (bottom, 1)))
        x = x + m.out(r.sigmoid() * torch.stack(ys, 1))
        return m.head(x + m.down(m.up(x).relu().square()))

    lins = {n: nn.Linear(D, D, bias=False) for n in ("k", "v", "r", "out")}
    mixes = {n: randn(D) for n in ("mix_k", "mix_v", "mix_r", "bonus", "decay")}
    model = Net(
        run,
        words=nn.Embedding(VOCAB, D),
        norm=nn.LayerNorm(D),
        **lins,
        **mixes,
        up=nn.Linear(D, 12),
        down=nn.Linear(12, D),
        head=nn.Linear(D, VOCAB),
    )
    return classify(model, ids(VOCAB, B, T))


@case()
def linear_attention() -> Built:
    """Cumulative sums of key-value products, in the style of RetNet, with a decay for each head."""

    def run(m: Net, tokens: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in m.qkv(m.words(tokens)).chunk(3, -1))
        steps = torch.arange(tokens.shape[1])
        away = (steps[:, None] - steps).clamp(min=0)
        keep = m.decay.sigmoid()[:, None, None] ** away * (steps[:, None] >= steps)
        return m.head((F.elu(q) @ F.elu(k).mT * keep @ v).transpose(1, 2).flatten(2))

    model = Net(
        run,
        words=nn.Embedding(VOCAB, D),
        qkv=nn.Linear(D, 3 * D),
        decay=randn(HEADS),
        head=nn.Linear(D, VOCAB),
    )
    return classify(model, ids(VOCAB, B, T))


def classifier(kind: str, **options: bool) -> Built:
    """Embedding, recurrent layers, the last step to classes."""
    width = 12 if options.get("bidirectional") else 6
    model = Net(
        lambda m, t: m.head(m.rnn(m.words(t))[0][:, -1]),
        words=nn.Embedding(VOCAB, D),
        rnn=getattr(nn, kind)(D, 6, 2, batch_first=True, **options),
        head=nn.Linear(width, 3),
    )
    return classify(model, ids(VOCAB, B, T))


@case("peers")
def lstm_classifier() -> Built:
    return classifier("LSTM", bidirectional=True)


@case("peers")
def gru_classifier() -> Built:
    return classifier("GRU")


@case("peers")
def text_cnn() -> Built:
    """Convolutions of several widths over the words, the maximum over time."""
    model = Net(
        lambda m, t: m.head(torch.cat([c(m.words(t).mT).relu().amax(2) for c in m.convs], 1)),
        words=nn.Embedding(VOCAB, D, padding_idx=0),
        head=nn.Linear(8, 3),
        convs=nn.ModuleList(nn.Conv1d(D, 4, k) for k in (2, 3)),
    )
    return classify(model, ids(VOCAB, B, T))


@case(axes=(0, 0))
def seq2seq_with_attention() -> Built:
    """A GRU encoder, a decoder cell in a loop with additive attention, teacher forcing."""

    def run(m: Net, source: Tensor, target: Tensor) -> Tensor:
        memory, last = m.encoder(m.words(source))
        state, logits = last[0], []
        for word in m.words(target).unbind(1):
            share = m.score((m.keys(memory) + m.query(state)[:, None]).tanh()).softmax(1)
            state = m.cell(torch.cat([word, (share * memory).sum(1)], -1), state)
            logits.append(m.head(state))
        return torch.stack(logits, 1)

    model = Net(
        run,
        words=nn.Embedding(VOCAB, D),
        encoder=nn.GRU(D, 6, batch_first=True),
        keys=nn.Linear(6, 4),
        query=nn.Linear(6, 4),
        score=nn.Linear(4, 1, bias=False),
        cell=nn.GRUCell(D + 6, 6),
        head=nn.Linear(6, VOCAB),
    )
    return classify(model, (ids(VOCAB, B, T), ids(VOCAB, B, 4)))


# Time series and sound.


@case()
def time_series() -> Built:
    """Convolution over time, GRU, the last state."""
    model = Net(
        lambda m, x: m.head(m.rnn(m.conv(x.mT).relu().mT)[1][0]),
        conv=nn.Conv1d(2, D, 3, padding=1),
        rnn=nn.GRU(D, 5, batch_first=True),
        head=nn.Linear(5, 2),
    )
    return regress(model, randn(B, 7, 2))


@case()
def wavenet() -> Built:
    """Dilated causal convolutions with gates, residuals and skips, weight norm on all."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.inp(x)
        skips = torch.zeros_like(x)
        for i, (both, out) in enumerate(zip(m.both, m.outs, strict=True)):
            a, g = both(F.pad(x, (2**i, 0))).chunk(2, 1)
            y = out(a.tanh() * g.sigmoid())
            x, skips = x + y, skips + y
        return m.head(skips.relu())

    model = Net(
        run,
        inp=nn.Conv1d(1, D, 1),
        head=nn.Conv1d(D, 2, 1),
        both=nn.ModuleList(weight_norm(nn.Conv1d(D, 2 * D, 2, dilation=2**i)) for i in range(3)),
        outs=nn.ModuleList(weight_norm(nn.Conv1d(D, D, 1)) for _ in range(3)),
    )
    return regress(model, randn(B, 1, 9))
