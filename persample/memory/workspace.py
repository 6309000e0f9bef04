"""What is used once, in memory that is kept: x or z scaled or transposed for a weighted sum, rows for a Gram matrix.

Memory that the C library gave back to the kernel must be found and cleared again, page by page, which costs more than
the product. Measured for 16 channels of 32 × 32 pixels, 128 samples, on two cores: scaling z and forming the weight
gradient takes 6.6 ms in fresh memory, 2.7 ms in memory that is kept. Each thread has its own; a CUDA device has
an allocator that keeps memory anyway.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST, LARGEST = 2**17, 32 * 2**20
"""Bytes of the products that go to kept memory, which is as large as the largest of them, for each dtype: smaller ones
are in memory that the C library keeps itself, larger ones would cost more memory than is worth it."""
VIEWS = 64
"""Shapes that are remembered, so that a step that repeats makes no view anew."""


class _Kept(threading.local):
    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype], Tensor] = {}
        self.views: dict[tuple[torch.Size, tuple[int, ...], torch.dtype], Tensor] = {}
        """Of the memory for "scaled", by the shape, the strides and the dtype of what is scaled."""

    def get(self, use: str, size: int, dtype: torch.dtype) -> Tensor:
        """Returns at least that many elements, which lie where those of the last call for this use did."""
        memory = self.memory.get((use, dtype))
        if memory is None or memory.numel() < size:
            memory = self.memory[use, dtype] = torch.empty(size, dtype=dtype)
            self.views.clear()
        return memory

    def view(self, rows: Tensor) -> Tensor | None:
        """Returns memory for what is scaled, with the shape and the strides of `rows`; None where none is kept."""
        key = rows.shape, rows.stride(), rows.dtype
        view = self.views.get(key)
        if view is None and _fits(rows):
            view = self.get("scaled", rows.numel(), rows.dtype).as_strided(rows.shape, rows.stride())
            if len(self.views) == VIEWS:
                self.views.clear()
            self.views[key] = view
        return view


_kept = _Kept()


def scaled(rows: Tensor, factors: Tensor, axis: int = 0) -> Tensor:
    """Returns the product of rows and factors, of the shape of rows; to be read before the next call, never returned.

    Arguments:
        rows: [B, …], or with B on another axis.
        factors: [B], of the same dtype and device.
        axis: of rows that counts samples.
    """
    factors = factors.view(-1, *(1,) * (rows.dim() - 1 - axis))
    if rows.requires_grad or factors.requires_grad or not _ordinary(rows):
        return rows * factors
    memory = _kept.view(rows)
    return rows * factors if memory is None else torch.mul(rows, factors, out=memory)


def transposed(rows: Tensor) -> Tensor:
    """Returns a copy of rows, [*, R, n], as [*, n, R], contiguous: the caller's to change before the next call."""
    memory = room(rows.mT.shape, rows, "scaled")
    return rows.mT.clone(memory_format=torch.contiguous_format) if memory is None else memory.copy_(rows.mT)


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Returns uninitialised memory with the dtype and device of `like`; valid until the next call."""
    found = room(shape, like)
    return like.new_empty(tuple(shape)) if found is None else found


def room(shape: Sequence[int], like: Tensor, use: str = "rows") -> Tensor | None:
    """Returns kept memory to write rows to, valid until the next call for this use; None where none is kept."""
    size = math.prod(shape)
    if not SMALLEST <= size * like.element_size() <= LARGEST or not _ordinary(like):
        return None
    return _kept.get(use, size, like.dtype)[:size].view(tuple(shape))


def _fits(rows: Tensor) -> bool:
    """Whether the rows are of a size to be kept, and fill their memory without gaps."""
    dense = rows.is_contiguous() or (rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last))
    return SMALLEST <= rows.nbytes <= LARGEST and dense


def _ordinary(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.is_cpu
        and not torch.compiler.is_dynamo_compiling()
        and not torch.is_inference_mode_enabled()  # what is made there may never be written to elsewhere
        and not torch._C._are_functorch_transforms_active()  # they refuse `out=`
    )
