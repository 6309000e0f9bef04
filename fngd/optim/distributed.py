"""What processes tell each other: counts, sums and rows, with the bytes that this takes.

Gram matrices over the samples of all processes: factors travel, matrices of B × B do not. With gram="layer" every
process solves for its own samples and DDP or FSDP averages the directions. With gram="global" each layer's x and z,
B·T·(I + O) numbers, are gathered from all processes (as SKFAC proposes), every process solves the same joint system
and keeps the coefficients of its own samples; the average of the directions is then the direction of the joined
batch. Compare I² + O² numbers for all-reducing Kronecker factors. What travels for those is in
`fngd.kronecker.processes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch import distributed as dist


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Returns the number of processes in the group; 1 where torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def mean_over_processes(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Returns the average of a tensor over the processes of the group."""
    count = world_size(group)
    if count == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, group=group)
    return value / count


class Exchange:
    """Gathers what all processes have; batches may differ in size, and shorter ones travel padded.

    `bytes_sent` counts what this process contributed to collectives, for as long as the object lives.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self._private: tuple[Any, Any] | None = None
        self.bytes_sent = 0

    @property
    def world(self) -> int:
        """The number of processes."""
        return world_size(self.group)

    @property
    def rank(self) -> int:
        """The number of this process among them."""
        return dist.get_rank(self.group) if self.world > 1 else 0

    @property
    def private(self) -> Any:
        """A group of the same processes of which nobody else knows, made when it is first needed.

        Within backward passes DDP's collectives would come in between, in each process at another moment.
        """
        if self._private is None or self._private[0] is not dist.group.WORLD:
            backend = "cpu:gloo,cuda:nccl" if dist.get_backend(self.group) == "nccl" and _has_gloo() else None
            ranks = None if self.group is None else dist.get_process_group_ranks(self.group)
            own = dist.new_group(ranks, backend=backend, use_local_synchronization=ranks is not None)
            self._private = dist.group.WORLD, own
        return self._private[1]

    def tell(self, numbers: list[int]) -> list[list[int]]:
        """Returns as many integers of every process. The host waits for the others, on a CPU backend for no device."""
        group = self.private
        own = torch.tensor(numbers)
        if torch.device("cpu") not in group._device_types:
            own = own.to(group._device_types[0])
        others = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(others, own, group=group)
        self.bytes_sent += own.nbytes
        return torch.stack(others).tolist()

    def tell_all(self, own: Any) -> list[Any]:
        """Returns an object of every process, within backward passes. Its bytes are not counted."""
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, own, group=self.private)
        return everyone

    def mine(self, sizes: list[int]) -> slice:
        """Returns where this process's samples are among all."""
        rank = dist.get_rank(self.group)
        return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def gather(self, tensor: Tensor, axis: int, sizes: list[int]) -> Tensor:
        """Returns the tensor with the samples of all processes along `axis`; `sizes`: how many each has."""
        rows = tensor.movedim(axis, 0)
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded, group=self.private)
        self.bytes_sent += padded.nbytes
        kept = [rows[:size] for rows, size in zip(received, sizes, strict=True)]
        return torch.cat(kept).movedim(0, axis)

    def messages(
        self, own: list[Tensor], shapes: list[list[tuple[int, ...]]], dtype: torch.dtype, device: torch.device
    ) -> list[list[Tensor]]:
        """Returns the tensors of every process, of which `shapes` are known; a process may have none."""
        sizes = [[torch.Size(shape).numel() for shape in each] for each in shapes]
        padded = torch.zeros(max(map(sum, sizes)), dtype=dtype, device=device)
        if own:
            flat = torch.cat([tensor.flatten().to(dtype) for tensor in own])
            padded[: len(flat)] = flat
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded, group=self.private)
        self.bytes_sent += padded.nbytes
        return [
            [part.view(shape) for part, shape in zip(message[: sum(each)].split(each), known, strict=True)]
            for message, each, known in zip(received, sizes, shapes, strict=True)
        ]

    def common(self, own: Iterable[str]) -> set[str]:
        """Returns the names that all processes have. The host waits for them; their few bytes are not counted."""
        return set.intersection(*map(set, self.everyone_says(sorted(own))))

    def everyone_says(self, own: Any) -> list[Any]:
        """Returns an object of every process; outside of backward passes. The host waits for them."""
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, own, group=self.group)
        return everyone

    def others(self, own: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Returns rows of integers that other processes have, and this one has not: mostly none, at 8 bytes."""
        number = crc32(repr(own).encode())
        if len(set(map(tuple, self.tell([number])))) == 1:
            return []
        return sorted(set().union(*self.tell_all(own)) - set(own))

    def table(self, rows: list[list[int]], device: torch.device) -> list[list[list[int]]]:
        """Returns a table of integers of every process; all have the same shape. The host waits for it."""
        if not rows:
            return [[] for _ in range(world_size(self.group))]
        own = torch.tensor(rows, device=device)
        others = [torch.empty_like(own) for _ in range(world_size(self.group))]
        dist.all_gather(others, own, group=self.group)
        self.bytes_sent += own.nbytes
        return torch.stack(others).tolist()

    def total(self, tensors: list[Tensor]) -> list[Tensor]:
        """Returns the sum over processes of each tensor; those of one precision travel together."""
        result = list(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = torch.cat([tensors[place].flatten() for place in places])
            dist.all_reduce(flat, group=self.group)
            self.bytes_sent += flat.nbytes
            parts = flat.split([tensors[place].numel() for place in places])
            for place, part in zip(places, parts, strict=True):
                result[place] = part.view(tensors[place].shape)
        return result

    def everyone(self, tensors: list[Tensor], shapes: list[list[tuple[int, ...]]]) -> list[list[Tensor]]:
        """Returns for each tensor those of all processes, of which `shapes` are known; shorter messages travel padded.

        Tensors of one precision travel together.
        """
        result: list[list[Tensor]] = [[] for _ in tensors]
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
            sizes = [[torch.Size(shape).numel() for shape in shapes[place]] for place in places]
            messages = [sum(column) for column in zip(*sizes, strict=True)]
            flat = torch.cat([tensors[place].flatten() for place in places])
            padded = flat.new_zeros(max(messages))
            padded[: len(flat)] = flat
            received = [torch.empty_like(padded) for _ in messages]
            dist.all_gather(received, padded, group=self.group)
            self.bytes_sent += padded.nbytes
            for process, message in enumerate(received):
                parts = message[: messages[process]].split([column[process] for column in sizes])
                for place, part in zip(places, parts, strict=True):
                    result[place].append(part.view(shapes[place][process]))
        return result


def _has_gloo() -> bool:
    return dist.is_gloo_available()


def whole_tensor(tensor: Tensor) -> Tensor:
    """Returns all of a tensor that FSDP2 may have sharded: what it holds, gathered from all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_like(whole: Tensor, param: Any) -> Tensor:
    """Returns a tensor, the same in all processes, sharded as the parameter is; nothing is sent."""
    if not hasattr(param, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)
