"""Fresh memory for large results, in huge pages where the caller asks for them.

The first write to a page of fresh memory makes the kernel find and clear that page. On Linux with transparent huge
pages at `madvise` a program may ask for pages of 2 MiB instead of 4 KiB, by madvise(2) with MADV_HUGEPAGE. Whether
that is faster depends on the machine, so it is off until `huge_pages(True)`. Measured in a virtual machine, 512 MiB
written once by one core, milliseconds of processor time:

    calls apart by      0 s     1 s       3 s       6 s
    pages of 4 KiB      208     249       242       246
    pages of 2 MiB      48      43-342    609-953   592-1061

That machine returns free memory to its host, which takes long to give large blocks again: on such a machine huge pages
pay only where large results follow each other closely. Measure, or reuse buffers by `grads(out=)`, which beats both.

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
_wanted = False


def huge_pages(wanted: bool) -> bool:
    """Says whether large results of this process are to lie in huge pages; returns what was said before (at first, no).

    ```python
    from persample.memory import huge_pages

    before = huge_pages(True)
    huge_pages(before)
    ```
    """
    global _wanted
    before, _wanted = _wanted, wanted
    return before


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
    """Returns the tensor; where huge pages are wanted, asks for them for its memory (not written to yet)."""
    if (
        not _wanted
        or type(tensor) is not Tensor  # a fake or a wrapped tensor has no memory of its own
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
