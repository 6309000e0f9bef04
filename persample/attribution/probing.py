"""Which sample does a row belong to? Asked of autograd, never guessed from shapes.

Back-propagate Σ_b ℓ_b and Σ_b w_b ℓ_b. Where one sample alone stands behind an entry of z, the second gradient
is w of that sample times the first, whatever transposes, window partitions or token routing lie between; where
samples mix, the ratio is no w_b. The weights are powers of two: every operation of a backward pass is linear
in z, and scaling by a power of two commutes with floating-point rounding, so the ratio is exact, bit for bit,
however much cancels in z. `LEVELS` powers tell that many samples apart; larger batches are told apart digit by
digit, in base `LEVELS`, one extra backward pass for each digit.

Exactness is asked of every entry, because with a tolerance a sample that dominates a sum would own what it shares.
Where rounding intervenes all the same (numbers near the smallest of the format, sums in no fixed order), and where it
alone could make a sum look like one sample's, `persample.attribution.support` decides. Entries that are not finite tell
nothing: `persample.attribution.stand_ins`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persample.attribution.owner import NOBODY, Owner, along_axis, arranged, fill, likely_axes
from persample.attribution.stand_ins import LEVELS as STAND_INS
from persample.blocks.precision import full_precision

LEVELS = {torch.float16: 8}
"""Powers of two per probe by precision; float16 has no exponents to spare."""
DEFAULT_LEVELS = 32
PIECE = 2**20
"""Bytes of z that are compared at a time."""


def probes(batch: int, dtype: torch.dtype, device: torch.device) -> list[Float[Tensor, " batch"]]:
    """Returns the weights w_b of each probe, [B]: powers of two that spell the sample's number."""
    levels = LEVELS.get(dtype, DEFAULT_LEVELS)
    number = torch.arange(batch, device=device)
    weights = []
    while True:
        weights.append(_powers(powers(levels, device)[number % levels], dtype))
        number = number // levels
        if batch <= levels ** len(weights):
            return weights


Visit = Callable[[int, Tensor], object]
"""Gets the number of a place, and the gradient there."""


def attribute(
    backward: Callable[[Tensor], Sequence[Any]],
    losses: Tensor,
    shapes: Sequence[Sequence[int] | None] | None = None,
    watch: Callable[[Tensor, Visit], None] | None = None,
    *,
    given: Callable[[int], Owner | None] | None = None,
    finite: Callable[..., AbstractContextManager[object]] | None = None,
) -> tuple[list[Tensor | None], list[Owner | None]]:
    """Returns z and owner at each of several places; an owner of None marks mixed samples (or no gradient).

    Args:
        backward: `backward(v)` returns the gradients of Σ_b v_b ℓ_b at these places; None among them where there
            is none. With `watch` it is called once.
        losses: [B].
        shapes: shape to give to each gradient; default: as it comes.
        watch: `watch(v, visit)` shows the same gradients one by one, and keeps none; by default those of `backward`.
            It is called ⌈log_`LEVELS` B⌉ times. Where samples lie in a regular pattern, nothing is kept here either.
        given: the owner at a place, as far as it is known by other means; asked where z is not finite.
        finite: `finite(run, level=level)`, a context in which passes are finite, see `persample.attribution.stand_ins`;
            `run` does
            one.
    """
    batch = losses.shape[0]

    def shaped(place: int, z: Tensor | None) -> Tensor | None:
        view = None if shapes is None else shapes[place]
        return z if z is None or view is None else z.view(tuple(view))

    def all_at_once(weights: Tensor, visit: Visit) -> None:
        for place, z in enumerate(backward(weights)):
            if z is not None:
                visit(place, z)

    zs = [shaped(place, z) for place, z in enumerate(backward(torch.ones_like(losses)))]
    present = [z.dtype for z in zs if z is not None] + [losses.dtype]
    lowest = min(present, key=lambda dtype: torch.finfo(dtype).max)
    found = [None if z is None else _Found(z, batch) for z in zs]
    for weights in probes(batch, lowest.to_real(), losses.device):

        def visit(place: int, probe: Tensor, weights: Tensor = weights) -> None:
            known, probe_there = found[place], shaped(place, probe)
            if known is not None and probe_there is not None:
                known.add(probe_there, weights)

        (all_at_once if watch is None else watch)(weights.to(losses.dtype), visit)
    levels = LEVELS.get(lowest, DEFAULT_LEVELS)
    owners = [None if known is None else known.owner(levels) for known in found]
    holes = [place for place, known in enumerate(found) if known is not None and known.holes]
    if given is not None:
        owners = [(given(place) if place in holes else None) or owner for place, owner in enumerate(owners)]
    holes = [place for place in holes if (owner := owners[place]) is not None and NOBODY in owner.ids]
    if holes and finite is not None:
        gradients = {place: z for place in holes if (z := zs[place]) is not None}

        def passes(level: int) -> AbstractContextManager[object]:
            return finite(lambda: backward(torch.ones_like(losses)), level=level)

        _fill_holes(owners, gradients, batch, passes, partial(attribute, backward, losses, shapes, watch))
    return zs, owners


def _fill_holes(
    owners: list[Owner | None],
    zs: Mapping[int, Tensor],
    batch: int,
    finite: Callable[[int], AbstractContextManager[object]],
    again: Callable[[], tuple[list[Tensor | None], list[Owner | None]]],
) -> None:
    """Changes the owners of gradients that are not finite, by passes that are; to None where these do not tell."""
    ids = {}
    for place, z in zs.items():
        owner = owners[place]
        if owner is not None:
            ids[place] = torch.where(z.isfinite() & (z != 0), owner.of_entries(z.shape), NOBODY)
    for level in (1, *STAND_INS):
        lost = [place for place in ids if bool(_lost(ids[place], zs[place]).any())]
        if not lost:
            break
        with finite(level):
            stand_ins, others = again()
        for place in lost if level > 1 else list(ids):
            if level == 1 and others[place] is None:
                owners[place] = None
                del ids[place]
            else:
                ids[place] = told_by(ids[place], stand_ins[place], others[place])
    for place, each in ids.items():
        owners[place] = _by_row(zs[place], each, batch)


def told_by(ids: Tensor, other: Tensor | None, others: Owner | None) -> Tensor:
    """The samples of entries, where they are nobody's those of another gradient, as far as it is not zero there."""
    if other is None or others is None:
        return ids
    return torch.where((ids == NOBODY) & (other != 0), others.of_entries(other.shape), ids)


def _lost(ids: Tensor, z: Tensor) -> Tensor:
    return (ids == NOBODY) & ~z.isfinite()


def _by_row(z: Tensor, ids: Tensor, batch: int) -> Owner | None:
    """The owner of entries; what no pass shows goes by its row, where there is one way only to read rows."""
    lost = _lost(ids, z)
    if not bool(lost.any()):
        return arranged(ids, batch)
    along = {axis: found for axis in range(z.ndim) if (found := along_axis(ids, axis)) is not None}
    if len(along) != 1:
        return None
    [(axis, found)] = along.items()
    joined = Owner(axis, fill(found, batch), batch)
    return None if bool((lost & (joined.of_entries(z.shape) == NOBODY)).any()) else joined


class _Found:
    """What the probes have shown of one z so far: the regular layouts that explain them exactly, or the probes.

    The first is the common case, quickly found, and tells what the probes were: they need not be kept.
    """

    def __init__(self, z: Tensor, batch: int) -> None:
        self._z, self._batch = z, batch
        self._layouts = list(_regular(z, batch))
        self._weights: list[Tensor] = []
        self._probes: list[Tensor] = []
        self.holes = False
        """Whether z is not finite everywhere; such entries are nobody's."""

    def add(self, probe: Tensor, weights: Tensor) -> None:
        """Compares another probe."""
        left = [layout for layout in self._layouts if self._explained(probe, weights, layout)]
        if self._layouts and not left:
            self._probes = [self._z * self._factors(before, self._layouts[0]) for before in self._weights]
        self._layouts = left
        self._weights.append(weights)
        if not left:
            self._probes.append(probe)

    def owner(self, levels: int) -> Owner | None:
        """Whom each entry belongs to, or None where samples mix."""
        if self._layouts and self._weights:
            return self._layouts[0]
        self.holes = self._batch > 1 and not bool(self._z.isfinite().all())
        return locate(self._z, self._probes, self._batch, levels)

    def _explained(self, probe: Tensor, weights: Tensor, layout: Owner) -> bool:
        """Whether the probe is z, each entry times its owner's weight, to the last bit; a piece at a time."""
        z, factors = self._z, self._factors(weights, layout)
        rows = max(1, PIECE * z.shape[0] // max(1, z.nbytes))
        pieces = zip(
            probe.split(rows), z.split(rows), factors.expand(z.shape[0], *factors.shape[1:]).split(rows), strict=True
        )
        return all(torch.equal(there, here * factor) for there, here, factor in pieces)

    def _factors(self, weights: Tensor, layout: Owner) -> Tensor:
        shape = [-1 if d == layout.axis else 1 for d in range(self._z.ndim)]
        return weights.to(self._z.real.dtype)[layout.ids].view(shape)


def _regular(z: Tensor, batch: int) -> Iterator[Owner]:
    """The owners of z if samples lay in a regular pattern along an axis, likely axes first."""
    arange = torch.arange(batch, device=z.device)
    for axis in likely_axes(z.shape, batch) if batch > 1 else ():
        each, rest = divmod(z.shape[axis], batch)
        if each and not rest:
            yield Owner(axis, arange.repeat_interleave(each), batch)
            if each > 1:
                yield Owner(axis, arange.repeat(each), batch)


def locate(z: Tensor, probed: Sequence[Tensor], batch: int, levels: int = DEFAULT_LEVELS) -> Owner | None:
    """Returns whom each entry of z belongs to, or None where samples mix; for any layout.

    Args:
        z: gradient of Σ_b ℓ_b, any shape.
        probed: the gradient of Σ_b w_b ℓ_b for each of `probes`, z's shape each.
        batch: number of samples B.
        levels: powers of two in each probe.
    """
    if batch <= 1 and z.ndim:
        return Owner(0, torch.zeros(z.shape[0], dtype=torch.long, device=z.device), batch)
    if batch <= 1:
        return Owner(None, torch.zeros((), dtype=torch.long, device=z.device), batch)
    ids = _of_entries(z, probed, batch, levels)
    if ids is None:
        return None
    return arranged(ids, batch) if bool(z.isfinite().all()) else Owner(None, ids, batch)


def powers(levels: int, device: torch.device) -> Int[Tensor, " levels"]:
    """The exponents of the weights by digit. None is zero: what a weight leaves as it is is no number."""
    digits = torch.arange(levels, device=device) - levels // 2
    return digits + (digits >= 0)


def _powers(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ldexp(torch.ones(exponents.shape, device=exponents.device, dtype=torch.float64), exponents).to(dtype)


def _of_entries(z: Tensor, probed: Sequence[Tensor], batch: int, levels: int) -> Int[Tensor, " *size"] | None:
    """The sample of every entry, exactly; None if an entry has no single sample. `NOBODY`: zero, NaN, infinity."""
    if z.is_complex():
        parts = [
            _of_entries(part(z), [part(probe) for probe in probed], batch, levels) for part in (torch.real, torch.imag)
        ]
        if parts[0] is None or parts[1] is None:
            return None
        clash = (parts[0] != parts[1]) & (parts[0] != NOBODY) & (parts[1] != NOBODY)
        return None if bool(clash.any()) else torch.maximum(parts[0], parts[1])
    silent = (z == 0) | ~z.isfinite()
    mantissa, exponent = torch.frexp(full_precision(z))
    ids = torch.zeros(z.shape, dtype=torch.long, device=z.device)
    wrong = torch.zeros(z.shape, dtype=torch.bool, device=z.device)
    for place, probe in enumerate(probed):
        other, raised = torch.frexp(full_precision(probe))
        power = raised - exponent
        digit = power + levels // 2 - (power > 0).to(power.dtype)
        wrong |= (other != mantissa) | (power == 0) | (digit < 0) | (digit >= levels)
        ids += digit.long() * levels**place
    ids[silent] = NOBODY
    return None if bool(((wrong & ~silent) | (ids >= batch)).any()) else ids
