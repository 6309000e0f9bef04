"""The networks of the FNGD paper's Section V by name; ResNets come from `fngd.training.models`.

The Transformer is that of Vaswani et al. (2017): normalised after each residual branch, sinusoidal positions,
embeddings times √width. Attention is written with four linear layers of its own, so that every weight matrix is a
linear layer that the optimisers can precondition; the embeddings of both languages and the output layer are three
separate tables.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

PADDING = 0
"""The word that fills up short sentences: it is not attended to and has no loss."""


class Attention(nn.Module):
    """Multi-head attention from four linear layers (Vaswani et al., Section 3.2.2)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}")
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        memory: Float[Tensor, "batch source width"],
        allowed: Bool[Tensor, "batch #one #time source"],
    ) -> Float[Tensor, "batch time width"]:
        """Every position of x attends to the allowed positions of memory."""
        query, key, value = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, attention to the source where `crosses`, and two linear layers; each a residual branch."""

    def __init__(self, width: int, hidden: int, heads: int, dropout: float, *, crosses: bool) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.cross = Attention(width, heads, dropout) if crosses else None
        self.expand, self.shrink = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if crosses else 2))
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, allowed: Tensor, memory: Tensor | None = None, allowed_memory: Tensor | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = self.norms[0](x + self.drop(self.attention(x, x, allowed)))
        if self.cross is not None:
            assert memory is not None, "a decoder's block is given the source"
            x = self.norms[1](x + self.drop(self.cross(x, memory, allowed_memory)))
        y = self.shrink(self.drop(F.relu(self.expand(x))))
        return self.norms[-1](x + self.drop(y))


def sinusoids(time: int, width: int, *, device: torch.device | None = None) -> Float[Tensor, "time width"]:
    """Returns sin and cos of position / 10000^(2i/width) (Vaswani et al., Section 3.5), sines first."""
    rates = torch.exp(-math.log(10_000.0) * torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(time, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class Transformer(nn.Module):
    """Encoder and decoder; the defaults are the paper's width 512, hidden 2048 and 8 heads.

    `forward(source, target)` takes word numbers [B, S] and [B, T] (`PADDING` fills up) and returns logits
    [B, T, target_words]: position t predicts target t + 1. `encode` and `decode` are its halves, for decoding.

    >>> model = Transformer(11, 13, width=8, hidden=16, heads=2, layers=1)
    >>> model(torch.ones(2, 5, dtype=torch.long), torch.ones(2, 4, dtype=torch.long)).shape
    torch.Size([2, 4, 13])
    """

    def __init__(
        self,
        source_words: int,
        target_words: int,
        *,
        width: int = 512,
        hidden: int = 2048,
        heads: int = 8,
        layers: int = 6,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.source = nn.Embedding(source_words, width)
        self.target = nn.Embedding(target_words, width)
        self.drop = nn.Dropout(dropout)
        self.encoder, self.decoder = (
            nn.ModuleList(Block(width, hidden, heads, dropout, crosses=crosses) for _ in range(layers))
            for crosses in (False, True)
        )
        self.out = nn.Linear(width, target_words)
        for name, parameter in self.named_parameters():
            if name in ("source.weight", "target.weight"):
                nn.init.normal_(parameter, std=width**-0.5)
            elif parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, source: Int[Tensor, "batch source"], target: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time words"]:
        """Returns logits."""
        return self.decode(target, self.encode(source), source)

    def encode(self, source: Int[Tensor, "batch source"]) -> Float[Tensor, "batch source width"]:
        """Returns what the decoder attends to."""
        x = self._embed(self.source, source)
        allowed = (source != PADDING)[:, None, None]
        for block in self.encoder:
            x = block(x, allowed)
        return x

    def decode(
        self,
        target: Int[Tensor, "batch time"],
        memory: Float[Tensor, "batch source width"],
        source: Int[Tensor, "batch source"],
    ) -> Float[Tensor, "batch time words"]:
        """Returns logits; a position sees the earlier ones and itself."""
        x = self._embed(self.target, target)
        time = target.shape[1]
        past = torch.ones(time, time, dtype=torch.bool, device=target.device).tril()[None, None]
        seen = (source != PADDING)[:, None, None]
        for block in self.decoder:
            x = block(x, past, memory, seen)
        return self.out(x)

    def _embed(self, table: nn.Embedding, words: Tensor) -> Tensor:
        width = table.embedding_dim
        x = table(words) * math.sqrt(width) + sinusoids(words.shape[1], width, device=words.device)
        return self.drop(x)
