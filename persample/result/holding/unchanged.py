"""Whether tensors are what they were when a batch was captured, for reductions that use them again.

Versions do not tell of every change: fused optimizers, `parameter.data` and NumPy arrays on the same memory raise none.
So the bits are added up with random factors, as integers: exact, and other where an entry has changed its value or its
place. It is one pass over memory, and made over that alone which the caller can write to: inputs, targets, parameters
and buffers, which are known by their addresses. Whatever else is held (activations, output gradients) is known by
version.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_INTEGERS = {4: torch.int32, 2: torch.int16, 1: torch.int8}
"""By bytes, the widest first; a CPU has no vector product of wider ones."""
_ROW = 4093
"""Integers in a row; rows have a factor each, columns are told apart by their place in the result.

A prime: of a sign, the highest bit, a sum tells only whether an odd number of them changed, and so those of a whole
tensor, or of some of its rows or columns, must not come in pairs.
"""
DATA = "a tensor of the inputs or targets was modified in place"


class Unchanged:
    """Remembers tensors that the caller can write to by their bits, and others by version."""

    def __init__(self, reached: Iterable[Tensor], others: Iterable[Tensor] = ()) -> None:
        reached = [part for each in reached for part in _parts(each)]
        self._reached = {_place(each): each for each in reached if _has_bits(each)}
        versioned = [*others, *(each for each in reached if not _has_bits(each))]
        self._versions = [(each, each._version) for each in versioned if not each.is_inference()]
        self.remember()

    def remember(self) -> None:
        """From now on the values are those that the tensors have."""
        self._bits = {place: bits(each) for place, each in self._reached.items()}

    def forget(self, kept: Iterable[Tensor]) -> None:
        """From now on all tensors but these may change."""
        ids, places = {id(each) for each in kept}, {_place(each) for each in kept if _has_bits(each)}
        self._versions = [(each, version) for each, version in self._versions if id(each) in ids]
        self._reached = {place: each for place, each in self._reached.items() if place in places}

    def still(self) -> bool:
        """Whether they are as they were."""
        return all(each._version == version for each, version in self._versions) and all(
            torch.equal(bits(each), self._bits[place]) for place, each in self._reached.items()
        )


def require(parameters: Unchanged | None, data: Unchanged, *, way: str) -> None:
    """Raises `RuntimeError` if the model's parameters and buffers, or the data of a batch, are not what they were.

    Args:
        parameters: of the model, and buffers.
        data: inputs, targets and whatever else is read again.
        way: the option that makes reductions use them again.
    """
    for unchanged, what in ((parameters, "parameters or buffers of the model were modified"), (data, DATA)):
        if unchanged is not None and not unchanged.still():
            raise RuntimeError(
                f"{what} after these per-sample gradients were captured, and with {way} every reduction uses them "
                "again. Form what you need before the optimizer's step, or capture the batch anew"
            )


@torch.no_grad()
def bits(tensor: Tensor) -> Tensor:
    """Sums of the bits of all entries, read as integers, with random factors.

    >>> from persample.result.holding.unchanged import bits
    >>> values = torch.arange(4.0)
    >>> bool((bits(values) == bits(values.clone())).all()), bool((bits(values) == bits(values.flip(0))).all())
    (True, False)
    """
    flat = _in_memory_order(tensor.detach())
    offset, size = flat.storage_offset() * flat.element_size(), flat.nbytes
    kind = next(kind for width, kind in _INTEGERS.items() if offset % width == size % width == 0)
    integers = flat.view(kind)
    whole = len(integers) // _ROW * _ROW
    rest = integers[whole:] if whole else integers
    sums = (rest * _factors(rest.device, torch.int64)[: len(rest)]).sum(0, keepdim=True)
    return torch.cat([_weighted(integers[:whole].view(-1, _ROW)), sums]) if whole else sums


def _in_memory_order(tensor: Tensor) -> Tensor:
    """All entries in one row, neighbours in memory beside each other."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_contiguous():
        if 0 in tensor.stride():  # the same entries many times
            tensor = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).contiguous()
    return tensor.view(-1)


def _weighted(rows: Tensor) -> Tensor:
    """The sum of rows of integers, each times a random factor."""
    factors = _factors(rows.device, rows.dtype)
    factors = (factors if len(rows) <= _ROW else factors.repeat(-(-len(rows) // _ROW)))[: len(rows)]
    if rows.device.type == "cpu":
        return factors @ rows  # one pass, which no other device has for integers
    return (rows * factors[:, None]).sum(0)


def addresses(tensors: Iterable[Tensor]) -> frozenset[int]:
    """Where the memory of tensors begins."""
    return frozenset([_address(part) for each in tensors if not is_lazy(each) for part in _parts(each)]) - {0}


def lies_in(tensor: Tensor, memory: frozenset[int]) -> bool:
    """Whether a tensor is a part of memory that begins at one of the `addresses`."""
    return bool(memory) and not memory.isdisjoint(map(_address, _parts(tensor)))


def _has_bits(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_nested


def _place(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold the numbers of one."""
    if tensor.layout is torch.strided and not tensor.is_nested:
        return (tensor,)
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    return (tensor.values(),)


def _address(tensor: Tensor) -> int:
    try:
        place = tensor.data_ptr()
        return place - tensor.storage_offset() * tensor.itemsize if place else 0
    except (NotImplementedError, RuntimeError, ValueError):
        return 0  # no storage: functorch wrappers, fake tensors, sparse ones


@cache
def _factors(device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**63), 2**63 - 1, (_ROW,), generator=generator) | 1  # odd: no bit is lost
    return drawn.to(device, dtype)
