"""Memory for large results: that of results let go of, or fresh; in huge pages where the caller asks for them.

The first write to a page of fresh memory makes the kernel find and clear that page, which takes several times as long
as the write. So from the third call of about the same size on, `grads()` writes its rows where earlier rows lay that
nothing refers to any more (`persample.memory.pool` says how that is known). Rows that anyone can still see, in whatever
form, are never written to: the next call then takes fresh memory. What this costs is memory: from the second call on,
that of one result stays with the process when the result is dropped, as long as the model lives, and up to an eighth of
what the process may use. `release()` gives it back; `reuse(False)` keeps none. Norms, Gram matrices and sums are not
concerned, nor is CUDA, whose allocator keeps memory anyway. As with `torch.from_numpy`, a result in reused memory
cannot grow: `resize_` to more entries than it has is an error.

On Linux with transparent huge pages at `madvise` a program may ask for pages of 2 MiB instead of 4 KiB, by madvise(2)
with MADV_HUGEPAGE. Whether that is faster depends on the machine, so it is off until `huge_pages(True)`. Measured in a
virtual machine, 512 MiB written once by one core, milliseconds of processor time:

    calls apart by      0 s     1 s       3 s       6 s
    pages of 4 KiB      208     249       242       246
    pages of 2 MiB      48      43-342    609-953   592-1061

(18 where memory is reused.) That machine returns free memory to its host, which takes long to give large blocks again:
on such a machine huge pages pay only where large results follow each other closely. Measure; reuse beats both.

Only pages that lie in the tensor as a whole are asked for, so a tensor that is written in full takes no more memory.
One of which little is written (`zeros`, for tables) would, and is better left alone.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from mmap import PAGESIZE

import torch
from torch import Tensor, nn

from persample.memory import pool
from persample.memory.pool import kept, release

__all__ = ["SMALLEST", "advise", "empty", "huge_pages", "kept", "release", "reuse", "rows", "zeros"]

SMALLEST = 4 * 2**20
"""Bytes below which a tensor is left alone: it would hold a page or none, and often lies in memory used before."""
_HUGEPAGE = 14  # MADV_HUGEPAGE, see madvise(2)
_wanted = False
_reusing = True


def reuse(wanted: bool) -> bool:
    """Says whether this process is to reuse the memory of large results of `grads()`; returns what was said before.

    At first it does. `reuse(False)` gives back what is kept, and results are fresh memory of torch's from then on.

    ```python
    from persample import memory

    before = memory.reuse(False)
    assert memory.kept() == 0
    memory.reuse(before)
    ```
    """
    global _reusing
    before, _reusing = _reusing, wanted
    if not wanted:
        release()
    return before


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


def rows(parameter: Tensor, batch: int, dtype: torch.dtype) -> Tensor | None:
    """Returns memory for the rows of a parameter, [B, *shape], contiguous and not initialised, to be written in full.

    None where it should be fresh: for rows smaller than `SMALLEST`, or asked for the first time; on other devices;
    where reuse is switched off; under torch.compile, function transforms and dispatch modes; and where torch is to
    fill fresh memory (`torch.utils.deterministic.fill_uninitialized_memory`).
    """
    if batch * parameter.numel() * dtype.itemsize < SMALLEST or not _own(parameter):
        return None
    found = pool.rows(parameter, (batch, *parameter.shape), dtype)
    return None if found is None else advise(found)


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Returns zeros of a shape, with the dtype and on the device of `like`.

    Large ones are fresh mappings of this process, which the kernel hands out as zeros: pages that nobody writes to cost
    nothing. torch writes zeros to every page: 170 ms for a table of 30,000 × 64 and 64 samples with 64
    words each, against 11.
    """
    wanted = tuple(shape)
    found = None
    if math.prod(wanted) * like.element_size() >= SMALLEST and _own(like):
        found = pool.zeros(wanted, like.dtype)
    return like.new_zeros(wanted) if found is None else found


def _own(like: Tensor) -> bool:
    """Whether results beside a tensor may lie in memory that is not torch's."""
    return (
        _reusing
        and pool.available()
        and type(like) in (Tensor, nn.Parameter)  # a fake or a distributed one has other memory
        and like.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and not (
            torch.are_deterministic_algorithms_enabled() and torch._C._get_deterministic_fill_uninitialized_memory()
        )
    )


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
