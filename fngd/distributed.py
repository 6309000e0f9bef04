"""Gram matrices over the samples of all processes: factors travel, matrices of B × B do not.

With gram="layer" every process solves for its own samples and DDP or FSDP averages the directions. With
gram="global" each layer's x and z, B·T·(I + O) numbers, are gathered from all processes (as SKFAC proposes),
every process solves the same joint system and keeps the coefficients of its own samples; the average of the
directions is then the direction of the joined batch. Compare I² + O² numbers for all-reducing Kronecker factors.
"""

from __future__ import annotations

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
    """Gathers the samples of all processes; batches may differ in size, and shorter ones travel padded.

    `bytes_sent` counts what this process contributed to all-gathers, for as long as the object lives. The sizes of
    the batches are exchanged before each layer, and the host waits for them: a few bytes, but with NCCL a
    synchronisation.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._sizes: list[int] = []
        self.bytes_sent = 0

    def sizes(self, batch: int, device: torch.device) -> tuple[list[int], slice]:
        """Returns the batch sizes of all processes and where this one's samples are among all."""
        if world_size(self._group) == 1:
            self._sizes = [batch]
            return [batch], slice(0, batch)
        own = torch.tensor([batch], device=device)
        others = [torch.empty_like(own) for _ in range(world_size(self._group))]
        dist.all_gather(others, own, group=self._group)
        self.bytes_sent += own.nbytes
        self._sizes = torch.cat(others).tolist()
        start = sum(self._sizes[: dist.get_rank(self._group)])
        return self._sizes, slice(start, start + batch)

    def gather(self, tensor: Tensor, axis: int = 0) -> Tensor:
        """Returns the tensor with the samples of all processes along `axis`; after `sizes` of the same batch."""
        if len(self._sizes) == 1:
            return tensor
        rows = tensor.movedim(axis, 0)
        padded = rows.new_zeros(max(self._sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        received = [torch.empty_like(padded) for _ in self._sizes]
        dist.all_gather(received, padded, group=self._group)
        self.bytes_sent += padded.nbytes
        kept = [rows[:size] for rows, size in zip(received, self._sizes, strict=True)]
        return torch.cat(kept).movedim(0, axis)
