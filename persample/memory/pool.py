"""Memory that results of `grads()` are lent, and that comes back when nothing refers to it any more.

The first write to a page of fresh memory costs several times what every later write does, so the rows of a parameter
are written where earlier rows of it were: in a block, an anonymous mapping of this process. A result is made on the
block by `torch.frombuffer`, and its storage owns the loan, a memoryview. When the storage dies, so does the loan, and
the block is free. So it is torch that tells: whatever keeps the memory visible keeps the storage, be it a view, a NumPy
array, a DLPack capsule, a saved tensor of a graph or a tensor in another thread; and a storage that is moved
(`share_memory_`) or exchanged lets go of the loan by itself. No use count is read, every result has a storage of its
own, and a memory address that is kept without the storage is as invalid as it is elsewhere.

What is kept belongs to the parameter, for it alone knows how large its rows are, whichever way they are asked for
(`per_sample` makes a new result for every batch; `grad` knows no model); with the parameter it goes. Of each at most
one block is kept, and none before two results of about the same size were asked for one after the other: sizes that
differ by a factor of two at most, so that a last, smaller batch, or batches drawn at random, are alike. All blocks
together take at most a share of the memory that the process may use.

Without locks, because a loan may end anywhere, in the middle of this very code too: blocks are appended to and popped
from deques of one place. A forked process starts with nothing.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections import deque
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

SHARE = 8
"""One part in this many of the memory that the process may use is kept at most."""
ALIKE = 2
"""Sizes are alike that differ by this factor at most."""
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux tells what the containers of a machine may use."""
_PRIVATE = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
"""Zero where the system has no memory of that kind."""


class _Slot:
    """What is known of the rows of one parameter."""

    def __init__(self, parameter: weakref.ref[Tensor]) -> None:
        self.parameter = parameter
        self.last = 0
        """Bytes of the result asked for last."""
        self.size = 0
        """Bytes of each block that is lent; 0: none is to be kept."""
        self.free: deque[mmap.mmap] = deque(maxlen=1)
        """The block that is kept."""

    def resize(self, size: int) -> None:
        """From now on blocks of another size: those lent before are not kept when they come back."""
        self.size = size
        self.free.clear()


_slots: dict[int, _Slot] = {}
"""By the identity of the parameter."""


def rows(parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Returns memory for a result of a parameter, contiguous and not initialised; None where it had better be fresh.

    Arguments:
        parameter: on a CPU, whose rows these are.
        shape: of the result, of one entry at least.
        dtype: of the result.
    """
    slot = _slot_of(parameter)
    nbytes = math.prod(shape) * dtype.itemsize
    last, slot.last = slot.last, nbytes
    if not _alike(last, nbytes):
        slot.resize(0)
        return None
    if nbytes > slot.size or not _alike(slot.size, nbytes):
        others = sum(other.size for other in list(_slots.values()) if other is not slot)
        slot.resize(nbytes if others + nbytes <= most() else 0)
        if not slot.size:
            return None
    block = _block(slot, nbytes)
    if block is None:
        return None
    loan = memoryview(block)[:nbytes]
    weakref.finalize(loan, _returned, weakref.ref(slot), block).atexit = False
    return _tensor(loan, shape, dtype)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Returns zeros, of one entry at least, in pages that nobody has touched; None where there is no memory."""
    block = _mapped(math.prod(shape) * dtype.itemsize)
    return None if block is None else _tensor(memoryview(block), shape, dtype)


def kept() -> int:
    """Returns the bytes that are kept for results to come.

    >>> model, batch = nn.Linear(1024, 512, bias=False), torch.randn(8, 1024)
    >>> before = persample.memory.reuse(True)
    >>> for _ in range(2):
    ...     rows = persample.per_sample(model, lambda y, _: y.sum(1), batch).grads()
    >>> held = persample.memory.kept()
    >>> del rows
    >>> persample.memory.kept() - held
    16777216
    >>> persample.memory.release()
    >>> _ = persample.memory.reuse(before)
    """
    return sum(len(block) for slot in list(_slots.values()) for block in list(slot.free))


def release() -> None:
    """Gives back what is kept, and forgets what was asked for: loans are not kept when they come back."""
    _slots.clear()


@cache
def most() -> int:
    """Returns the bytes that are kept at most: a share of the machine's memory, or of the container's."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(Path, _LIMITS):
        try:
            found.append(int(path.read_text()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return min(found) // SHARE


def available() -> bool:
    """Whether the system has private memory to lend."""
    return _PRIVATE != 0


def _slot_of(parameter: Tensor) -> _Slot:
    key = id(parameter)
    slot = _slots.get(key)
    if slot is None or slot.parameter() is not parameter:
        slot = _slots[key] = _Slot(weakref.ref(parameter, partial(_gone, key)))
    return slot


def _gone(key: int, parameter: weakref.ref[Tensor]) -> None:
    """Forgets a parameter that has died, if no other one has taken its identity."""
    slot = _slots.get(key)
    if slot is not None and slot.parameter is parameter:
        _slots.pop(key, None)


def _block(slot: _Slot, nbytes: int) -> mmap.mmap | None:
    """The block that is kept, or a new one; None where there is no memory, which is for torch to say."""
    try:
        block = slot.free.pop()
        if len(block) >= nbytes:
            return block
    except IndexError:
        pass
    return _mapped(max(slot.size, nbytes))


def _mapped(nbytes: int) -> mmap.mmap | None:
    """A new block."""
    try:
        return mmap.mmap(-1, nbytes, flags=_PRIVATE)
    except (OSError, OverflowError):
        return None


def _tensor(loan: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose storage owns the loan."""
    found = torch.frombuffer(loan, dtype=dtype)
    return found.resize_(shape)  # in place: a view would keep the tensor that it is of, and with it the loan


def _returned(slot: weakref.ref[_Slot], block: mmap.mmap) -> None:
    """A storage has died, and nothing refers to its memory: the block is kept if its parameter still wants one."""
    owner = slot()
    if owner is not None and len(block) == owner.size:
        owner.free.append(block)  # and lets go of one that is there


def _alike(one: int, other: int) -> bool:
    return max(one, other) <= ALIKE * min(one, other)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=release)
