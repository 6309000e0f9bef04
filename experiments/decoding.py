"""Greedy and beam search for `experiments.models.Transformer`, a word at a time: keys and values are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from experiments.models import PADDING, Attention, Transformer, sinusoids
from experiments.text import BEGIN, END, Numbers, padded

Words = list[int]


class Stepper:
    """The decoder on N rows, one position at a time; what `decode` gives at its last position."""

    def __init__(self, model: Transformer, source: Int[Tensor, "rows source"]) -> None:
        self.model, self.time = model, 0
        memory = model.encode(source)
        self._seen = (source != PADDING)[:, None, None]
        self._blocks: list[tuple[Any, Attention]] = []
        self._cross: list[tuple[Tensor, Tensor]] = []
        for block in model.decoder:
            cross = block.cross
            assert isinstance(cross, Attention), "a decoder's block attends to the source"
            self._blocks.append((block, cross))
            self._cross.append((_heads(cross, cross.key(memory)), _heads(cross, cross.value(memory))))
        self._own: list[tuple[Tensor, Tensor]] = []

    def __call__(self, words: Int[Tensor, " rows"]) -> Float[Tensor, "rows words"]:
        """Returns the logits of what follows `words`, the words at the present position."""
        table = self.model.target
        width = table.embedding_dim
        position = sinusoids(self.time + 1, width, device=words.device)[-1]
        x = (table(words) * math.sqrt(width) + position)[:, None]
        for number, (block, cross) in enumerate(self._blocks):
            own = block.attention
            key, value = _heads(own, own.key(x)), _heads(own, own.value(x))
            if self.time:
                key, value = (torch.cat(pair, 2) for pair in zip(self._own[number], (key, value), strict=True))
                self._own[number] = key, value
            else:
                self._own.append((key, value))
            x = block.norms[0](x + _attend(own, x, key, value, None))
            x = block.norms[1](x + _attend(cross, x, *self._cross[number], self._seen))
            x = block.norms[2](x + block.shrink(F.relu(block.expand(x))))
        self.time += 1
        return self.model.out(x[:, 0])

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Goes on with these rows: some may be dropped, some doubled."""
        self._own = [(key[rows], value[rows]) for key, value in self._own]
        self._cross = [(key[rows], value[rows]) for key, value in self._cross]
        self._seen = self._seen[rows]


def _heads(attention: Attention, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def _attend(attention: Attention, x: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
    mixed = F.scaled_dot_product_attention(_heads(attention, attention.query(x)), key, value, attn_mask=allowed)
    return attention.out(mixed.transpose(1, 2).flatten(2))


def longest(source: Int[Tensor, "rows source"]) -> int:
    """How many words a translation may have: half as many again as the longest source, and ten."""
    return source.shape[1] * 3 // 2 + 10


@torch.no_grad()
def greedy(model: Transformer, source: Int[Tensor, "batch source"]) -> list[Words]:
    """Returns each sentence's words, the likeliest one at every position, up to and without END."""
    stepper, rows = Stepper(model, source), torch.arange(len(source), device=source.device)
    found: list[Words] = [[] for _ in range(len(source))]
    words = torch.full_like(rows, BEGIN)
    for _ in range(longest(source)):
        words = stepper(words).argmax(1)
        going = words != END
        for row, word in zip(rows[going].tolist(), words[going].tolist(), strict=True):
            found[row].append(word)
        if not going.any():
            break
        if not going.all():
            stepper.select(going.nonzero()[:, 0])
            rows, words = rows[going], words[going]
    return found


@torch.no_grad()
def beam(
    model: Transformer, source: Int[Tensor, "batch source"], *, size: int = 5, penalty: float = 0.6
) -> list[Words]:
    """Returns each sentence's best words by beam search, without END.

    The `size` likeliest beginnings are followed; a hypothesis Y that ends is scored by
    log P(Y) / ((5 + |Y|)/6)^penalty (Wu et al. 2016, equation 14; |Y| counts END), and a sentence is finished when
    `size` hypotheses have ended. With size 1 this is greedy search.
    """
    batch, vocabulary = len(source), model.out.out_features
    stepper = Stepper(model, source.repeat_interleave(size, 0))
    sums = source.new_zeros(batch, size, dtype=torch.float32)
    sums[:, 1:] = -math.inf  # all beams of a sentence begin alike: one of them is enough
    texts: list[list[Words]] = [[[] for _ in range(size)] for _ in range(batch)]
    ended: list[list[tuple[float, Words]]] = [[] for _ in range(batch)]
    active = list(range(batch))  # the sentence of each group of rows
    words = source.new_full((batch * size,), BEGIN)
    for length in range(1, longest(source) + 1):
        scores = stepper(words).log_softmax(1).view(len(active), size, vocabulary) + sums[:, :, None]
        top, index = scores.flatten(1).topk(2 * size, 1)  # at most `size` of them end
        rows, words_next, sums_next, kept = [], [], [], []
        for place, (sentence, values, numbers) in enumerate(zip(active, top.tolist(), index.tolist(), strict=True)):
            beams: list[tuple[float, int, int]] = []
            for rank, (value, number) in enumerate(zip(values, numbers, strict=True)):
                parent, word = divmod(number, vocabulary)
                if word == END:
                    if rank < size and value > -math.inf:
                        ended[sentence].append((value / ((5 + length) / 6) ** penalty, texts[sentence][parent]))
                elif len(beams) < size:
                    beams.append((value, parent, word))
            if len(ended[sentence]) < size:
                kept.append(sentence)
                rows += [place * size + parent for _, parent, _ in beams]
                words_next += [word for _, _, word in beams]
                sums_next.append([value for value, _, _ in beams])
                texts[sentence] = [[*texts[sentence][parent], word] for _, parent, word in beams]
        active = kept
        if not active:
            break
        stepper.select(torch.tensor(rows, device=source.device))
        words = torch.tensor(words_next, device=source.device)
        sums = torch.tensor(sums_next, device=source.device)
    for place, sentence in enumerate(active):  # too long: what there is
        if not ended[sentence]:
            ended[sentence] = [(sums[place, 0].item(), texts[sentence][0])]
    return [max(found, key=lambda pair: pair[0])[1] for found in ended]


def translate(
    search: Callable[[Transformer, Tensor], list[Words]],
    model: Transformer,
    sources: Sequence[Words],
    *,
    rows: int = 100,
) -> list[Words]:
    """Returns the translations of encoded sources, in their order; similar lengths go together.

    The model must be in evaluation mode, or its dropout would go on.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout is random; call model.eval() first")
    device = model.out.weight.device
    order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
    found: list[Words] = [[] for _ in sources]
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        results = search(model, padded([sources[index] for index in chosen]).to(device))
        for index, words in zip(chosen, results, strict=True):
            found[index] = words
    return found


def sources(pairs: Numbers) -> list[Words]:
    """Returns the source sides."""
    return [pair[0] for pair in pairs]
