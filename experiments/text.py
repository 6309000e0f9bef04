"""Sentence pairs for translation: files, vocabularies, batches.

| name       | files looked for below `--data-dir`                                            |
| ---------- | ------------------------------------------------------------------------------ |
| `multi30k` | `multi30k/{train,val,test_2016_flickr}.{en,de}`, a sentence a line, as written  |
| `toy`      | none: sentences of five words and their word-by-word translation, turned round |

The vocabulary of a language is a byte-level BPE (Sennrich et al. 2016) learnt from its training sentences alone, so
every text can be written in it and comes back as it was: BLEU is computed on plain, detokenised text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from experiments.models import PADDING
from fngd.training.data import DataError

BEGIN, END = 1, 2
SPECIAL = ("<pad>", "<s>", "</s>")
PARTS = ("train", "val", "test_2016_flickr")
Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Corpus:
    """Pairs of (source sentence, target sentence) to train on, to tune with, to test with."""

    train: Pairs
    validation: Pairs
    test: Pairs


def load(name: str, data_dir: Path | None, source: str, target: str) -> Corpus:
    """Returns a corpus. Raises DataError where a file is missing or two files do not match."""
    if name == "toy":
        return _toy()
    if name != "multi30k":
        raise ValueError(f"corpus {name!r} is unknown; choose one of ['multi30k', 'toy']")
    if data_dir is None:
        raise DataError("multi30k needs --data-dir, the folder that contains multi30k/train.en")
    parts = []
    for part in PARTS:
        sides = [_lines(data_dir / "multi30k" / f"{part}.{language}") for language in (source, target)]
        if len(sides[0]) != len(sides[1]):
            raise DataError(
                f"{part}: {len(sides[0])} sentences in {source!r}, {len(sides[1])} in {target!r}; they must be "
                "translations of each other, line by line"
            )
        parts.append(list(zip(*sides, strict=True)))
    return Corpus(*parts)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"looked for the file {path}, which does not exist; --data-dir is the folder above multi30k")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]


def _toy() -> Corpus:
    nouns = dict(zip("dog cat man child bird horse".split(), "Hund Katze Mann Kind Vogel Pferd".split(), strict=True))
    verbs = dict(zip("sees hears follows".split(), "sieht hört verfolgt".split(), strict=True))
    adjectives = dict(zip("small old red".split(), "klein alt rot".split(), strict=True))
    pairs = [
        (f"one {a} {n} {v} {m}.", f"{nouns[m]} {verbs[v]} {nouns[n]} {adjectives[a]} ein.")
        for a in adjectives
        for n in nouns
        for v in verbs
        for m in nouns
    ]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [pairs[index] for index in order]
    return Corpus(pairs[:256], pairs[256:288], pairs[288:])


class Vocabulary:
    """A byte-level BPE: text to numbers and back. 0 is padding, 1 begins and 2 ends a sentence."""

    def __init__(self, sentences: Sequence[str], size: int) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        self._tokenizer: Any = Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        self._tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        self._tokenizer.train_from_iterator(sentences, trainer)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, sentence: str) -> list[int]:
        """Returns the sentence's numbers, with BEGIN before and END behind them."""
        return [BEGIN, *self._tokenizer.encode(sentence).ids, END]

    def decode(self, numbers: Sequence[int]) -> str:
        """Returns the text up to the first END, without special numbers."""
        kept = list(numbers)
        kept = kept[: kept.index(END)] if END in kept else kept
        return self._tokenizer.decode([number for number in kept if number >= len(SPECIAL)]).strip()


Numbers = list[tuple[list[int], list[int]]]
Batch = tuple[Int[Tensor, "batch source"], Int[Tensor, "batch target"]]


def encode(pairs: Pairs, source: Vocabulary, target: Vocabulary) -> Numbers:
    """Returns the pairs in numbers."""
    return [(source.encode(first), target.encode(second)) for first, second in pairs]


def padded(sentences: Sequence[Sequence[int]]) -> Int[Tensor, "batch time"]:
    """Returns sentences as a table, shorter ones filled up with PADDING.

    >>> padded([[1, 5, 2], [1, 2]]).tolist()
    [[1, 5, 2], [1, 2, 0]]
    """
    table = torch.full((len(sentences), max(map(len, sentences))), PADDING)
    for row, sentence in zip(table, sentences, strict=True):
        row[: len(sentence)] = torch.tensor(sentence)
    return table


def batches(pairs: Numbers, size: int, *, seed: int, epoch: int, pool: int = 16) -> Iterator[Batch]:
    """Yields an epoch's batches, all of `size` pairs; which pairs are left over differs from epoch to epoch.

    Pairs are shuffled, then sorted by length within `pool` batches, so that little is padding, and these batches are
    shuffled again. All batches having one size, coefficients can be kept by position.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(len(pairs), generator=generator).tolist()
    order = order[: len(order) // size * size]
    chunks: list[list[int]] = []
    for first in range(0, len(order), pool * size):
        part = sorted(order[first : first + pool * size], key=lambda i: (len(pairs[i][1]), len(pairs[i][0])))
        chunks += [part[begin : begin + size] for begin in range(0, len(part), size)]
    for number in torch.randperm(len(chunks), generator=generator).tolist():
        chosen = [pairs[index] for index in chunks[number]]
        yield padded([pair[0] for pair in chosen]), padded([pair[1] for pair in chosen])
