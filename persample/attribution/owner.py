"""Owner: the sample behind each entry of a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

NOBODY = -1


@dataclass(frozen=True)
class Output:
    """What is known of a gradient that is not held."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, z: Tensor) -> Output:
        """Of a gradient that is there."""
        return cls(tuple(z.shape), z.dtype, z.device)


@dataclass(frozen=True)
class Owner:
    """The sample behind each entry of one z.

    With `axis`, the sample depends only on the index along that axis and `ids` is [size of axis]; without, `ids`
    has the shape of z. `NOBODY` marks entries that were zero.
    """

    axis: int | None
    ids: Int[Tensor, " *size"]
    batch: int

    @cached_property
    def layout(self) -> str:
        """How samples lie along the axis: identity, grouped (0 0 1 1), tiled (0 1 0 1), ragged, scattered."""
        if self.axis is None:
            return "scattered"
        size = self.ids.shape[0]
        arange = torch.arange(self.batch, device=self.ids.device)
        if size == self.batch and torch.equal(self.ids, arange):
            return "identity"
        if self.batch and size % self.batch == 0:
            if torch.equal(self.ids, arange.repeat_interleave(size // self.batch)):
                return "grouped"
            if torch.equal(self.ids, arange.repeat(size // self.batch)):
                return "tiled"
        return "ragged"

    def by_sample(self, tensor: Tensor, axis: int | None = None) -> Tensor:
        """The tensor with `axis` (default: the owner's) split into samples and positions, [B, T, *others].

        Samples with fewer positions are filled up with zeros.
        """
        axis = axis if axis is not None else self.axis
        if axis:
            tensor = tensor.movedim(axis, 0)
        if self.layout == "identity":
            return tensor.unsqueeze(1)
        rest = tensor.shape[1:]
        if self.layout == "grouped":
            return tensor.reshape(self.batch, -1, *rest)
        if self.layout == "tiled":
            return tensor.reshape(-1, self.batch, *rest).transpose(0, 1)
        places, filled = self._places
        picked = tensor.index_select(0, places.reshape(-1)).view(*places.shape, *rest)
        return picked.masked_fill(~filled.view(*filled.shape, *(1 for _ in rest)), 0)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Index along the axis of position t of sample b, and whether there is one; [B, T] each."""
        rows = ((self.ids != NOBODY) & (self.ids < self.batch)).nonzero()[:, 0]
        samples = self.ids[rows]
        order = samples.argsort(stable=True)
        rows, samples = rows[order], samples[order]
        counts = samples.bincount(minlength=self.batch)
        longest = int(counts.max()) if self.batch else 0
        place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[samples]
        index = self.ids.new_zeros(self.batch, longest)
        index[samples, place] = rows
        return index, torch.arange(longest, device=rows.device) < counts[:, None]

    def sum_by_sample(self, tensor: Tensor) -> Tensor:
        """The tensor, of z's shape, summed over its axis sample by sample: [B, *others]."""
        rows = self.by_sample(tensor)
        return rows[:, 0] if self.layout == "identity" else rows.sum(1)

    def of_entries(self, shape: Sequence[int]) -> Int[Tensor, " *size"]:
        """The sample of each entry of z, which has this shape."""
        if self.axis is None:
            return self.ids
        return self.ids.view([-1 if d == self.axis else 1 for d in range(len(shape))]).expand(tuple(shape))

    def mask(self, samples: slice) -> Tensor:
        """Boolean [n, *z.shape or broadcastable]: the entries of each sample of the slice."""
        numbers = torch.arange(self.batch, device=self.ids.device)[samples]
        return self.ids == numbers.view(-1, *(1 for _ in self.ids.shape))

    def masked(self, z: Tensor, samples: slice) -> Tensor:
        """z with everything but one sample set to zero, one row for each sample of the slice: [n, *z.shape]."""
        mask = self.mask(samples)
        if self.axis is not None:
            mask = mask.view(mask.shape[0], *(-1 if d == self.axis else 1 for d in range(z.ndim)))
        return torch.where(mask, z, z.new_zeros(()))


def arranged(ids: Int[Tensor, " *size"], batch: int) -> Owner:
    """The owner of entries whose samples are known; silent ones go by their row, and rows by the others' pattern."""
    for axis in likely_axes(ids.shape, batch):
        along = along_axis(ids, axis)
        if along is not None:
            return Owner(axis, fill(along, batch), batch)
    return Owner(None, ids, batch)


def likely_axes(shape: Sequence[int], batch: int) -> list[int]:
    """Axes in the order in which samples are looked for: of size B first, then of a multiple of B."""
    return sorted(range(len(shape)), key=lambda axis: (shape[axis] != batch, shape[axis] % batch != 0, axis))


def along_axis(ids: Int[Tensor, " *size"], axis: int) -> Int[Tensor, " axis"] | None:
    """The sample at each index of the axis, where no index has two; None otherwise."""
    if ids.numel() == 0:
        return ids.new_full((ids.shape[axis],), NOBODY)
    flat = ids.movedim(axis, 0).reshape(ids.shape[axis], -1)
    most = flat.amax(1)
    return most if bool(((flat == most[:, None]) | (flat == NOBODY)).all()) else None


def fill(ids: Tensor, batch: int) -> Tensor:
    """Owners of silent rows, where all the others follow one of the regular patterns."""
    known = ids != NOBODY
    if batch == 0 or ids.shape[0] % batch or bool(known.all()):
        return ids
    arange = torch.arange(batch, device=ids.device)
    for pattern in (arange.repeat_interleave(ids.shape[0] // batch), arange.repeat(ids.shape[0] // batch)):
        if torch.equal(ids[known], pattern[known]):
            return pattern
    return ids
