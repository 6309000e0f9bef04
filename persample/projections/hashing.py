"""Random numbers by place, not by turn: what stands at row r and column c of a random matrix, for any part of it.

A number is a hash of a key and of its place (SplitMix64: Steele, Lea and Flood, *Fast Splittable Pseudorandom Number
Generators*, 2014), in integers that wrap around alike everywhere. So every process and device has the same matrix,
whatever part of it is formed, in whatever order, and none is stored.
"""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor

BYTES = 8
"""Of a hash, each of which gives as many signs as it has bits."""


def key_of(*words: object) -> int:
    """Returns the key of a seed and names, the same in every process.

    >>> key_of(0, "layer.weight") == key_of(0, "layer.weight"), key_of(0, "a") == key_of(1, "a")
    (True, False)
    """
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return _signed(int.from_bytes(digest, "little"))


def hashed(key: int, places: Tensor) -> Tensor:
    """Returns 64 random bits for each place, as int64.

    >>> hashed(1, torch.arange(5))[3] == hashed(1, torch.tensor([3]))[0]
    tensor(True)
    """
    mixed = places.long() * _signed(0x9E3779B97F4A7C15) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    return mixed ^ _shifted(mixed, 31)


def below(key: int, places: Tensor, size: int | Tensor) -> Tensor:
    """Returns an integer below `size` for each place, all as likely but for one part in 2^62 / size."""
    return _shifted(hashed(key, places), 2) % size


def signs(key: int, rows: int, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns entries ±1 of a matrix of `rows` rows at the given columns, [*columns.shape, rows]."""
    words = -(-rows // (8 * BYTES))
    places = columns.long()[..., None] * words + torch.arange(words, device=columns.device)
    found = (hashed(key, places)[..., None] >> 8 * torch.arange(BYTES, device=columns.device)) & 255
    return _signs_of_bytes(columns.device, dtype)[found].flatten(-3)[..., :rows]


@cache
def _signs_of_bytes(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Of every byte the signs that its bits stand for, [256, 8]: a row is copied in a fraction of the time of eight
    shifts."""
    bits = torch.arange(256)[:, None] >> torch.arange(8)
    return (1 - 2 * (bits & 1)).to(device, dtype)


def _shifted(words: Tensor, by: int) -> Tensor:
    """Shifted to the right, with zeros from the left: that of torch copies the sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
