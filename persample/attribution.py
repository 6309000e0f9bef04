"""Which sample does a row belong to? Asked of autograd, never guessed from shapes.

Back-propagate Σ_b ℓ_b and Σ_b w_b ℓ_b. Where one sample alone stands behind an entry of z, the second gradient
is w of that sample times the first, whatever transposes, window partitions or token routing lie between; where
samples mix, the ratio is no w_b. The weights are powers of two: every operation of a backward pass is linear
in z, and scaling by a power of two commutes with floating-point rounding, so the ratio is exact however much
cancels in z. `LEVELS` powers tell that many samples apart; larger batches are told apart digit by digit, in
base `LEVELS`, one extra backward pass for each digit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

LEVELS = {torch.float16: 8}
"""Powers of two per probe by precision; float16 has no exponents to spare."""
DEFAULT_LEVELS = 32
TOLERANCE = {torch.float64: 1e-8, torch.complex128: 1e-8, torch.float32: 1e-3, torch.complex64: 1e-3}
"""Largest part of a row, in norm, that may come from elsewhere; half precision: `HALF_TOLERANCE`."""
HALF_TOLERANCE = 5e-2
NOBODY = -1


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
        tensor = tensor.movedim(axis if axis is not None else self.axis or 0, 0)
        rest = tensor.shape[1:]
        if self.layout == "identity":
            return tensor.unsqueeze(1)
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
        places = [(self.ids == b).nonzero()[:, 0] for b in range(self.batch)]
        longest = max((len(place) for place in places), default=0)
        index = self.ids.new_zeros(self.batch, longest)
        filled = torch.zeros_like(index, dtype=torch.bool)
        for b, place in enumerate(places):
            index[b, : len(place)] = place
            filled[b, : len(place)] = True
        return index, filled

    def sum_by_sample(self, tensor: Tensor) -> Tensor:
        """The tensor, of z's shape, summed over its axis sample by sample: [B, *others]."""
        rows = self.by_sample(tensor)
        return rows[:, 0] if self.layout == "identity" else rows.sum(1)

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


def probes(batch: int, dtype: torch.dtype, device: torch.device) -> list[Float[Tensor, " batch"]]:
    """Returns the weights w_b of each probe, [B]: powers of two that spell the sample's number."""
    levels = LEVELS.get(dtype, DEFAULT_LEVELS)
    number = torch.arange(batch, device=device)
    weights = []
    while True:
        digit = number % levels
        weights.append(torch.ldexp(torch.ones(batch, device=device, dtype=torch.float64), digit - levels // 2))
        number = number // levels
        if batch <= levels ** len(weights):
            return [w.to(dtype) for w in weights]


def locate(z: Tensor, probed: Sequence[Tensor], batch: int, levels: int = DEFAULT_LEVELS) -> Owner | None:
    """Returns whom each entry of z belongs to, or None where samples mix.

    Args:
        z: gradient of Σ_b ℓ_b, any shape.
        probed: the gradient of Σ_b w_b ℓ_b for each of `probes`, z's shape each.
        batch: number of samples B.
        levels: powers of two in each probe.
    """
    tolerance = TOLERANCE.get(z.dtype, HALF_TOLERANCE)
    if batch == 1 and z.ndim:
        return Owner(0, torch.zeros(z.shape[0], dtype=torch.long, device=z.device), batch)
    if z.ndim == 0:
        flat = [t.reshape(1, 1) for t in (z, *probed)]
        ids = _identify(flat[0], flat[1:], batch, levels, tolerance) if batch > 1 else torch.zeros(1, dtype=torch.long)
        return None if ids is None else Owner(None, ids.view(()).to(z.device), batch)
    sizes = z.shape
    axes = sorted(range(z.ndim), key=lambda a: (sizes[a] != batch, batch == 0 or sizes[a] % batch != 0, a))
    for axis in axes:
        if sizes[axis] == 0:
            return Owner(axis, torch.empty(0, dtype=torch.long, device=z.device), batch)
        flat = [t.movedim(axis, 0).reshape(sizes[axis], -1) for t in (z, *probed)]
        ids = _identify(flat[0], flat[1:], batch, levels, tolerance)
        if ids is not None:
            return Owner(axis, _fill(ids, batch), batch)
    ids = _identify(z.reshape(-1, 1), [p.reshape(-1, 1) for p in probed], batch, levels, tolerance)
    return None if ids is None else Owner(None, ids.view(sizes), batch)


def _identify(
    z: Float[Tensor, "row entry"] | Complex[Tensor, "row entry"],
    probed: Sequence[Tensor],
    batch: int,
    levels: int,
    tolerance: float,
) -> Int[Tensor, " row"] | None:
    """The sample of each row, `NOBODY` for rows of zeros, or None if a row has no single sample."""
    scale = z.abs().amax(1) if z.shape[1] else torch.zeros(z.shape[0], dtype=z.real.dtype, device=z.device)
    silent, finite = scale == 0, scale.isfinite()
    # rows of NaN or infinity carry no ratio; like silent ones they are left to the pattern of the others
    known = ~silent & finite
    unit = z / torch.where(known, scale, 1.0)[:, None]
    energy = torch.linalg.vector_norm(unit, dim=1).square()
    ids = torch.zeros(z.shape[0], dtype=torch.long, device=z.device)
    for position, probe in enumerate(probed):
        other = probe / torch.where(known, scale, 1.0)[:, None]
        ratio = (other * unit.conj()).sum(1).real / energy
        usable = known & (ratio > 0) & ratio.isfinite()
        digit = torch.log2(torch.where(usable, ratio, 1.0)).round().long()
        power = torch.ldexp(torch.ones_like(energy), digit)
        miss = torch.linalg.vector_norm(other / power[:, None] - unit, dim=1) / energy.sqrt()
        digit = digit + levels // 2
        good = usable & (miss <= tolerance) & (digit >= 0) & (digit < levels)
        if not bool((good | ~known).all()):
            return None
        ids += digit * levels**position
    ids[~known] = NOBODY
    return None if bool((ids >= batch).any()) else ids


def _fill(ids: Tensor, batch: int) -> Tensor:
    """Owners of silent rows, where all the others follow one of the regular patterns."""
    known = ids != NOBODY
    if batch == 0 or ids.shape[0] % batch or bool(known.all()):
        return ids
    arange = torch.arange(batch, device=ids.device)
    for pattern in (arange.repeat_interleave(ids.shape[0] // batch), arange.repeat(ids.shape[0] // batch)):
        if torch.equal(ids[known], pattern[known]):
            return pattern
    return ids


def backward_pairs(
    backward: Callable[[Tensor], Sequence[Any]], losses: Tensor
) -> tuple[Sequence[Any], list[Sequence[Any]], int]:
    """The gradients of Σ_b ℓ_b and of each probe, and the number of levels.

    `backward(v)` returns the gradients of Σ_b v_b ℓ_b; None among them where there is none.
    """
    z = backward(torch.ones_like(losses))
    lowest = min((t.dtype for t in z if t is not None), key=_exponents, default=losses.dtype)
    weights = probes(losses.shape[0], lowest if lowest in LEVELS else losses.dtype, losses.device)
    return z, [backward(w.to(losses.dtype)) for w in weights], LEVELS.get(lowest, DEFAULT_LEVELS)


def _exponents(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max
