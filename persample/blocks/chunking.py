"""Temporary memory: how much of a batch, or of a matrix, is worked on at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

CHUNK_BYTES = 64 * 2**20
"""Temporary memory a reduction may take, in bytes; results are not counted."""
CACHE_BYTES = 4 * 2**20
"""Rows formed only to be consumed are formed this many bytes at a time on a CPU, to be read from its cache."""


def chunks(length: int, bytes_each: int, budget: int | None = None) -> Iterator[slice]:
    """Slices that cover range(length), of at most `budget` (default: `CHUNK_BYTES`) bytes but one entry at least."""
    step = max(1, (CHUNK_BYTES if budget is None else budget) // max(1, bytes_each))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def consumed_budget(device: torch.device) -> int:
    """Bytes of rows to form at a time when they are consumed at once."""
    return min(CACHE_BYTES, CHUNK_BYTES) if device.type == "cpu" else CHUNK_BYTES
