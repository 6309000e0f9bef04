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


class _Kept(threading.local):
    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, use: str, size: int, dtype: torch.dtype) -> Tensor:
        """Returns at least that many elements, which lie where those of the last call for this use did."""
        memory = self.memory.get((use, dtype))
        if memory is None or memory.numel() < size:
            memory = self.memory[use, dtype] = torch.empty(size, dtype=dtype)
        return memory


_kept = _Kept()


def scaled(rows: Tensor, factors: Tensor, axis: int = 0) -> Tensor:
    """Returns the product of rows and factors, of the shape of rows; to be read before the next call, never returned.

    Arguments:
        rows: [B, …], or with B on another axis.
        factors: [B], of the same dtype and device.
        axis: of rows that counts samples.
    """
    factors = factors.view(-1, *[1] * (rows.dim() - 1 - axis))
    if not _fits(rows) or rows.requires_grad or factors.requires_grad:
        return rows * factors
    memory = _kept.get("scaled", rows.numel(), rows.dtype)
    return torch.mul(rows, factors, out=memory.as_strided(rows.shape, rows.stride()))


def transposed(rows: Tensor) -> Tensor:
    """Returns a copy of rows, [R, n], as [n, R], contiguous: the caller's to change before the next call."""
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
    """Whether the rows fill their memory without gaps, and their product may lie in memory that is kept."""
    dense = rows.is_contiguous() or (rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last))
    return SMALLEST <= rows.nbytes <= LARGEST and dense and _ordinary(rows)


def _ordinary(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_inference_mode_enabled()  # what is made there may never be written to elsewhere
        and not torch._C._are_functorch_transforms_active()  # they refuse `out=`
    )
