"""Mixtures of experts, and few trainable parameters beside frozen ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.testing.cases.parts import mlp
from persample.testing.cases.table import Built, Net, classify, group, ids, randn, regress

case = group("language", "architecture")
B, T, D, HEADS, VOCAB = 3, 5, 8, 2, 11


def mixture(normalise: bool = True) -> Built:
    """Mixtral: every token goes to its two best experts of four; rows are picked by index, returned by
    index_add.
    """

    def experts(m: Net, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, chosen = m.gate(rows).softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True) if normalise else weights
        out = torch.zeros_like(rows)
        for e, expert in enumerate(m.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(rows[token]) * weights[token, slot, None])
        return out.view_as(x)

    layer = Net(experts, gate=nn.Linear(D, 4, bias=False), experts=nn.ModuleList(mlp(D, 6) for _ in range(4)))
    model = Net(
        lambda m, t: m.head(m.experts(m.norm(m.words(t)))),
        words=nn.Embedding(VOCAB, D),
        norm=nn.LayerNorm(D),
        experts=layer,
        head=nn.Linear(D, VOCAB),
    )
    return classify(model, ids(VOCAB, B, T))


case("routing", "peers", name="mixture of experts")(mixture)


@case("routing")
def mixture_with_stacked_experts() -> Built:
    """All experts in one tensor [E, in, out], the rows sorted by expert and multiplied by its slice; one is
    idle.
    """

    def run(m: Net, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weight, chosen = m.gate(rows).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=len(m.w)).tolist()
        parts = [r @ w for r, w in zip(rows[order].split(counts), m.w, strict=True)]
        return (torch.cat(parts)[order.argsort()] * weight[:, None]).view(*x.shape[:2], -1)

    model = Net(run, gate=nn.Linear(D, 5), w=randn(5, D, 4))
    return regress(model, randn(B, T, D))


@case("routing")
def mixture_with_dense_dispatch() -> Built:
    """Switch Transformer: one-hot dispatch and combine by einsum, without dropping."""

    def run(m: Net, x: Tensor) -> Tensor:
        probability, chosen = m.gate(x).softmax(-1).max(-1)
        route = F.one_hot(chosen, 3).to(x.dtype)
        y = torch.einsum("bte,btd,edh->ebth", route, x, m.up).relu()
        return torch.einsum("bte,ebth,ehd->btd", route * probability[..., None], y, m.down)

    return regress(Net(run, gate=nn.Linear(D, 3), up=randn(3, D, 6), down=randn(3, 6, D)), randn(B, T, D))


@case("peers")
def lora() -> Built:
    """Frozen layers, each with a trainable product of two thin matrices beside it."""

    def adapted(part: Net, x: Tensor) -> Tensor:
        return part.base(x) + 2 * part.up(part.down(x))

    def layer(inp: int, out: int) -> Net:
        return Net(
            adapted,
            base=nn.Linear(inp, out).requires_grad_(False),
            down=nn.Linear(inp, 2, bias=False),
            up=nn.Linear(2, out, bias=False),
        )

    words = nn.Embedding(VOCAB, D).requires_grad_(False)
    return classify(nn.Sequential(words, layer(D, 12), nn.GELU(), layer(12, VOCAB)), ids(VOCAB, B, T))


@case()
def lora_merged() -> Built:
    """The two thin matrices multiplied into the frozen weight before it is used (PEFT, DoRA with its
    magnitude).
    """

    def adapted(part: Net, x: Tensor) -> Tensor:
        whole = part.base.weight + part.up @ part.down
        return F.linear(x, part.size[:, None] * whole / whole.norm(dim=1, keepdim=True), part.base.bias)

    def layer(inp: int, out: int) -> Net:
        return Net(
            adapted,
            base=nn.Linear(inp, out).requires_grad_(False),
            down=randn(2, inp),
            up=randn(out, 2),
            size=randn(out),
        )

    return regress(nn.Sequential(layer(D, 12), nn.GELU(), layer(12, 3)), randn(B, T, D))


@case()
def prompt_tuning() -> Built:
    """Only a few learned tokens before the input of a frozen model learn."""
    model = Net(
        lambda m, x: m.body(torch.cat([m.prompt.expand(len(x), -1, -1), x], 1)).mean(1),
        body=nn.TransformerEncoderLayer(D, HEADS, 12, 0.0, batch_first=True).requires_grad_(False),
        prompt=randn(1, 2, D),
    )
    return regress(model, randn(B, T, D))
