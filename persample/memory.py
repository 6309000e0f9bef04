"""Fresh memory for large results, in huge pages where the system has them.

The first write to a page of fresh memory makes the kernel find and clear that page: of 512 MiB, written once by one
core, 190 ms are spent for 131,072 pages of 4 KiB, and 28 ms for 768 faults where pages of 2 MiB are allowed. On Linux
with transparent huge pages at `madvise` (the default of most distributions) a program has to ask for them, by
madvise(2) with MADV_HUGEPAGE. Asking is advice: where it has no effect, nothing changes but the time.

Only pages that lie in the tensor as a whole are asked for, so a tensor that is written in full takes no more memory.
One of which little is written (`new_zeros` for tables) would, and is better left alone.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache
from mmap import PAGESIZE

import torch
from torch import Tensor

SMALLEST = 4 * 2**20
"""Bytes below which a tensor is left alone: it would hold a page or none, and often lies in memory used before."""
_HUGEPAGE = 14  # MADV_HUGEPAGE, see madvise(2)


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's madvise; None where there is no such advice."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function


def advise(tensor: Tensor) -> Tensor:
    """Asks for huge pages for the memory of a tensor that nothing was written to yet; returns the tensor."""
    if (
        type(tensor) is not Tensor  # a fake or a wrapped tensor has no memory of its own
        or tensor.device.type != "cpu"
        or tensor.untyped_storage().nbytes() < SMALLEST
        or torch.compiler.is_compiling()
    ):
        return tensor
    madvise = _madvise()
    if madvise is not None:
        storage = tensor.untyped_storage()
        start = -(-storage.data_ptr() // PAGESIZE) * PAGESIZE
        end = (storage.data_ptr() + storage.nbytes()) // PAGESIZE * PAGESIZE
        madvise(start, end - start, _HUGEPAGE)  # refused or not, the tensor is the same
    return tensor


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Returns uninitialised memory of a shape, with the dtype and on the device of `like`.

    ```python
    import torch
    from persample.memory import empty

    rows = empty((128, 1024, 784), torch.zeros(1))
    assert rows.shape == (128, 1024, 784) and rows.dtype == torch.float32
    ```
    """
    return advise(like.new_empty(tuple(shape)))
