"""Models in which data place rows: mixtures of experts in several layouts, valid tokens, graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Experts(nn.Module):
    """Tokens are sent to `chosen` of four experts, in one of the layouts in use."""

    def __init__(self, layout: str, chosen: int) -> None:
        super().__init__()
        self.layout, self.chosen = layout, chosen
        self.gate = nn.Linear(6, 4, bias=False)
        self.inner, self.outer = (nn.Parameter(torch.randn(4, *s) / 3) for s in ((6, 5), (5, 6)))

    def expert(self, number: int, rows: Tensor) -> Tensor:
        return F.silu(rows @ self.inner[number]) @ self.outer[number]

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, experts = self.gate(tokens).softmax(1).topk(self.chosen, 1)
        out = torch.zeros_like(tokens)
        if self.layout == "loop":
            for number in range(4):
                rows, slot = (experts == number).nonzero(as_tuple=True)
                out = out.index_add(0, rows, weights[rows, slot, None] * self.expert(number, tokens[rows]))
        elif self.layout == "sorted":
            order = experts.flatten().argsort(stable=True)
            counts = torch.bincount(experts.flatten(), minlength=4).tolist()
            rows = tokens[order // self.chosen].split(counts)
            found = torch.cat([self.expert(number, each) for number, each in enumerate(rows)])
            out = out.index_add(0, order // self.chosen, found * weights.flatten()[order, None])
        elif self.layout == "mask":
            for number in range(4):
                there = (experts == number).any(1)
                weight = (weights * (experts == number)).sum(1)[there, None]
                out[there] = out[there] + self.expert(number, tokens[there]) * weight
        elif self.layout == "put back":
            order = experts.flatten().argsort(stable=True)
            rows = tokens.repeat_interleave(self.chosen, 0)[order]
            counts = torch.bincount(experts.flatten(), minlength=4).tolist()
            found = torch.cat([self.expert(number, each) for number, each in enumerate(rows.split(counts))])
            back = torch.zeros_like(found).index_copy(0, order, found).view(-1, self.chosen, 6)
            out = (back * weights[..., None]).sum(1)
        return x + out.view_as(x)


class Model(nn.Module):
    def __init__(self, layout: str, chosen: int) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.layers = nn.Sequential(Experts(layout, chosen), Experts(layout, chosen))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.table(words)))).mean(1)


class ValidTokens(nn.Module):
    """Padding is taken out before the layers and put back behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, words: Tensor) -> Tensor:
        there = words > 2
        rows = self.inner(self.table(words[there])).tanh()
        full = torch.zeros(*words.shape, 6).index_put((there,), rows)
        return self.head(full).sum(1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    f"{layout}, {chosen}": lambda layout=layout, chosen=chosen: Model(layout, chosen)
    for layout in ("loop", "sorted", "mask", "put back")
    for chosen in (1, 2, 3)
} | {"valid tokens": ValidTokens}


def losses_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")
