"""Small Transformer language models, each with what its family does differently."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.testing.cases.parts import RMSNorm, attend, heads, mlp
from persample.testing.cases.table import Built, Net, classify, group, ids, randn

case = group("language", "architecture")
B, T, D, HEADS, VOCAB = 3, 5, 8, 2, 11


class Conv1D(nn.Module):
    """GPT-2's linear layer: weight [in, out], applied by addmm on flattened tokens."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(inp, out))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def gpt2(depth: int = 2, steps: int = T) -> Built:
    """GPT-2: learned positions by ids [1, T], Conv1D, a causal mask, a head tied to the embedding."""

    def block(part: Net, x: Tensor) -> Tensor:
        q, k, v = part.qkv(part.norm1(x)).split(D, -1)
        x = x + part.out(attend(heads(q), heads(k), heads(v), causal=True))
        return x + part.down(F.gelu(part.up(part.norm2(x)), approximate="tanh"))

    def run(m: Net, tokens: Tensor) -> Tensor:
        x = m.words(tokens) + m.positions(torch.arange(tokens.shape[1])[None])
        for part in m.blocks:
            x = part(x)
        return m.head(m.norm(x))

    blocks = nn.ModuleList(
        Net(
            block,
            qkv=Conv1D(D, 3 * D),
            out=Conv1D(D, D),
            up=Conv1D(D, 16),
            down=Conv1D(16, D),
            norm1=nn.LayerNorm(D),
            norm2=nn.LayerNorm(D),
        )
        for _ in range(depth)
    )
    model = Net(
        run,
        words=nn.Embedding(VOCAB, D),
        positions=nn.Embedding(7, D),
        blocks=blocks,
        norm=nn.LayerNorm(D),
        head=nn.Linear(D, VOCAB, bias=False),
    )
    model.head.weight = model.words.weight
    return classify(model, ids(VOCAB, B, steps))


case("peers", name="gpt2")(gpt2)


@case("peers", name="gpt2 (T = B)")
def _() -> Built:
    return gpt2(depth=1, steps=B)


def bert(shared: bool = False) -> Built:
    """BERT: words, positions, token types, padding masks, norms after the residual, a class token."""

    def block(part: Net, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (heads(lin(x)) for lin in (part.q, part.k, part.v))
        x = part.norm1(x + part.out(attend(q, k, v, bias)))
        return part.norm2(x + part.mlp(x))

    def run(m: Net, tokens: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        x = m.norm(m.words(tokens) + m.types(types) + m.positions(m.ids[:, : tokens.shape[1]]))
        bias = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, -1e9)[:, None, None]
        for part in m.blocks:
            x = part(x, bias)
        return m.head(m.pool(x[:, 0]).tanh())

    def parts() -> Net:
        return Net(
            block,
            q=nn.Linear(D, D),
            k=nn.Linear(D, D),
            v=nn.Linear(D, D),
            out=nn.Linear(D, D),
            mlp=mlp(D),
            norm1=nn.LayerNorm(D),
            norm2=nn.LayerNorm(D),
        )

    blocks = nn.ModuleList([parts()] * 2 if shared else [parts(), parts()])
    model = Net(
        run,
        words=nn.Embedding(VOCAB, D, padding_idx=0),
        types=nn.Embedding(2, D),
        blocks=blocks,
        positions=nn.Embedding(7, D),
        norm=nn.LayerNorm(D),
        pool=nn.Linear(D, D),
        head=nn.Linear(D, 3),
    )
    model.register_buffer("ids", torch.arange(7)[None])
    mask = torch.arange(T) < torch.tensor([[5], [3], [4]])
    return classify(model, (ids(VOCAB, B, T) * mask, ids(2, B, T), mask))


case("peers", name="bert")(bert)


@case(name="albert")
def _() -> Built:
    """One block for all depths."""
    return bert(shared=True)


def llama(norm_dtype: torch.dtype = torch.float64) -> Built:
    """Llama: RMSNorm, rotary positions, fewer key and value heads than query heads, SwiGLU, no biases."""
    size, kv = 4, 1  # of a head; number of key and value heads

    def rotate(x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] / 100 ** (torch.arange(0, size, 2) / size)
        turn = torch.cat([angles, angles], -1).to(x.dtype)
        left, right = x.chunk(2, -1)
        return x * turn.cos() + torch.cat([-right, left], -1) * turn.sin()

    def block(part: Net, x: Tensor) -> Tensor:
        y = part.norm1(x)
        q, k, v = heads(part.q(y), HEADS), heads(part.k(y), kv), heads(part.v(y), kv)
        k, v = (t[:, :, None].expand(-1, -1, HEADS // kv, -1, -1).flatten(1, 2) for t in (rotate(k), v))
        x = x + part.out(attend(rotate(q), k, v, causal=True))
        y = part.norm2(x)
        return x + part.down(F.silu(part.gate(y)) * part.up(y))

    def lin(inp: int, out: int) -> nn.Linear:
        return nn.Linear(inp, out, bias=False)

    blocks = nn.Sequential(
        *(
            Net(
                block,
                norm1=RMSNorm(D, norm_dtype),
                norm2=RMSNorm(D, norm_dtype),
                q=lin(D, D),
                k=lin(D, kv * size),
                v=lin(D, kv * size),
                out=lin(D, D),
                gate=lin(D, 12),
                up=lin(D, 12),
                down=lin(12, D),
            )
            for _ in range(2)
        )
    )
    layers = nn.Sequential(nn.Embedding(VOCAB, D), blocks, RMSNorm(D, norm_dtype), lin(D, VOCAB))
    return classify(layers, ids(VOCAB, B, T))


case("peers", name="llama")(llama)


@case("peers", "float32", name="llama (norm in float32)")
def _() -> Built:
    return llama(torch.float32)


@case("peers")
def t5() -> Built:
    """T5: encoder and decoder with one embedding, a table of relative position biases shared by the layers of
    each stack, RMS norms before the residual, a scaled tied head.
    """

    def bias(table: nn.Embedding, q: int, k: int, both: bool) -> Tensor:
        away = torch.arange(k)[None] - torch.arange(q)[:, None]
        bucket = (away if both else away.clamp(max=0)).clamp(-2, 2) + 2
        return table(bucket).permute(2, 0, 1)[None]

    def layer(part: Net, x: Tensor, bias: Tensor, memory: Tensor | None = None) -> Tensor:
        y = part.norm1(x)
        q, k, v = (heads(part.qkv(y)[..., i * D : (i + 1) * D]) for i in range(3))
        x = x + part.out(attend(q, k, v, bias))
        if memory is not None:
            k, v = part.kv(memory).chunk(2, -1)
            x = x + attend(heads(part.q(part.norm3(x))), heads(k), heads(v))
        return x + part.down(part.up(part.norm2(x)).relu())

    def run(m: Net, source: Tensor, target: Tensor) -> Tensor:
        x, y = m.words(source), m.words(target)
        near = bias(m.encoder_bias, source.shape[1], source.shape[1], True)
        for part in m.encoder:
            x = part(x, near)
        steps = target.shape[1]
        near = bias(m.decoder_bias, steps, steps, False)
        near = near.masked_fill(torch.ones(steps, steps).triu(1).bool(), -1e9)
        for part in m.decoder:
            y = part(y, near, m.norm(x))
        return F.linear(y / math.sqrt(D), m.words.weight)

    def lin(inp: int, out: int) -> nn.Linear:
        return nn.Linear(inp, out, bias=False)

    def parts(cross: bool) -> Net:
        more = {"q": lin(D, D), "kv": lin(D, 2 * D), "norm3": RMSNorm(D)} if cross else {}
        return Net(
            layer,
            qkv=lin(D, 3 * D),
            out=lin(D, D),
            up=lin(D, 12),
            down=lin(12, D),
            norm1=RMSNorm(D),
            norm2=RMSNorm(D),
            **more,
        )

    model = Net(
        run,
        words=nn.Embedding(VOCAB, D),
        norm=RMSNorm(D),
        encoder=nn.ModuleList([parts(False), parts(False)]),
        decoder=nn.ModuleList([parts(True)]),
        encoder_bias=nn.Embedding(5, HEADS),
        decoder_bias=nn.Embedding(5, HEADS),
    )
    return classify(model, (ids(VOCAB, B, T), ids(VOCAB, B, 4)))


@case()
def transformer_xl() -> Built:
    """Relative attention with two global query biases and sinusoids through a layer of their own, without a
    batch.
    """

    def run(m: Net, tokens: Tensor) -> Tensor:
        x = m.words(tokens)
        steps = tokens.shape[1]
        distance = torch.arange(steps)[:, None] - torch.arange(steps)[None]
        where = m.r(torch.sin(torch.arange(-steps + 1, steps)[:, None] / torch.arange(1, D + 1)).to(x.dtype))
        q, k, v = (heads(t) for t in m.qkv(x).chunk(3, -1))
        r = where[distance + steps - 1].unflatten(-1, (HEADS, -1)).permute(2, 0, 1, 3)
        bias = torch.einsum("bnid,nijd->bnij", q + m.v[:, None], r)
        return m.head(x + attend(q + m.u[:, None], k, v, bias, causal=True))

    model = Net(
        run,
        words=nn.Embedding(VOCAB, D),
        qkv=nn.Linear(D, 3 * D),
        r=nn.Linear(D, D, bias=False),
        u=randn(HEADS, D // HEADS),
        v=randn(HEADS, D // HEADS),
        head=nn.Linear(D, VOCAB),
    )
    return classify(model, ids(VOCAB, B, T))


@case()
def fused_attention() -> Built:
    """scaled_dot_product_attention on one packed projection, flash-style."""

    def run(m: Net, tokens: Tensor) -> Tensor:
        q, k, v = m.qkv(m.words(tokens)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return m.head(y.transpose(1, 2).flatten(2))

    model = Net(run, words=nn.Embedding(VOCAB, D), qkv=nn.Linear(D, 3 * D), head=nn.Linear(D, VOCAB))
    return classify(model, ids(VOCAB, B, T))


@case("peers", "time-major")
def translation_time_major() -> Built:
    """nn.Transformer in its default layout, embeddings and sinusoids transposed to time first, as in the
    tutorial.
    """

    def run(m: Net, source: Tensor, target: Tensor) -> Tensor:
        x, y = m.words(source).transpose(0, 1), m.words(target).transpose(0, 1)
        wave = torch.sin(torch.arange(T)[:, None] * torch.arange(1, D + 1)).to(x.dtype)[:, None]
        mask = nn.Transformer.generate_square_subsequent_mask(len(y), dtype=y.dtype)
        return m.head(m.body(x + wave[: len(x)], y + wave[: len(y)], tgt_mask=mask)).transpose(0, 1)

    model = Net(
        run,
        words=nn.Embedding(VOCAB, D),
        body=nn.Transformer(D, HEADS, 1, 1, 12, 0.0),
        head=nn.Linear(D, VOCAB),
    )
    return classify(model, (ids(VOCAB, B, T), ids(VOCAB, B, 4)))
