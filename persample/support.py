"""Whose rows are whose by where gradients are zero: slower than `persample.attribution`, and never deceived.

Back-propagate the losses of half of the samples, those whose number has a bit set, with random weights, and of the
others; bit by bit. An entry of sample a alone is zero in every pass without a. One in which another sample c has a part
is not: some bit tells a from c, and one of its two passes has c and not a. However small c's part may be beside that of
a, nothing large is there to hide it; what is left to chance is that parts of several others cancel to the last bit.
Nor does it matter in which order a kernel adds, or how many digits numbers near the smallest of a format have.

It takes 2 ⌈log₂ B⌉ passes, where powers of two take one or two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from persample.attribution import NOBODY, Output, Owner, Visit, along_axis, fill, likely_axes


def supported(
    watch: Callable[[Tensor, Visit], None],
    losses: Tensor,
    outputs: Sequence[Output | None],
    finite: Callable[[Callable[[], object]], AbstractContextManager[object]],
) -> list[Owner | None]:
    """Returns the owner at each of several places, None where samples mix.

    Args:
        watch: `watch(v, visit)` shows the gradients of Σ_b v_b ℓ_b one by one, and keeps none.
        losses: [B].
        outputs: what is known of each gradient; None where there is none.
        finite: as of `persample.attribution.attribute`.
    """
    owners, told = _once(watch, losses, outputs)
    if not told:
        with finite(lambda: watch(torch.ones_like(losses), lambda place, z: None)):
            owners, _ = _once(watch, losses, outputs)
    return owners


def supported_by(
    backward: Callable[[Tensor], Sequence[Tensor | None]],
    losses: Tensor,
    outputs: Sequence[Output | None],
    finite: Callable[[Callable[[], object]], AbstractContextManager[object]],
) -> list[Owner | None]:
    """The same, by a backward pass that returns the gradients all at once."""

    def watch(weights: Tensor, visit: Visit) -> None:
        for place, z in enumerate(backward(weights)):
            if z is not None:
                visit(place, z)

    return supported(watch, losses, outputs, finite)


def _once(
    watch: Callable[[Tensor, Visit], None], losses: Tensor, outputs: Sequence[Output | None]
) -> tuple[list[Owner | None], bool]:
    """Owners, and whether all gradients were finite, so that they tell."""
    number = torch.arange(losses.shape[0], device=losses.device)
    generator = torch.Generator().manual_seed(0)
    found = [None if output is None else _Support(output, len(number)) for output in outputs]
    for place in range(bits_of(len(number))):
        for value in (0, 1):
            drawn = 1 + torch.rand(losses.shape, generator=generator)

            def visit(at: int, z: Tensor, place: int = place, value: int = value) -> None:
                support = found[at]
                if support is not None:
                    support.add(place, value, z)

            watch(torch.where((number >> place) & 1 == value, drawn.to(losses), 0), visit)
    owners = [None if support is None else support.owner() for support in found]
    return owners, all(support is None or support.finite for support in found)


def bits_of(batch: int) -> int:
    """How many bits the samples' numbers have."""
    return max(batch - 1, 0).bit_length()


class _Support:
    """In which passes each entry of one gradient was not zero."""

    def __init__(self, output: Output, batch: int) -> None:
        self._batch = batch
        self._ids = torch.zeros(output.shape, dtype=torch.long, device=output.device)
        self._known, self._zeros = torch.zeros_like(self._ids), torch.zeros_like(self._ids)
        self._before = torch.zeros_like(self._ids, dtype=torch.bool)
        self._mixed = False
        self.finite = True

    def add(self, place: int, value: int, z: Tensor) -> None:
        """Takes the gradient of the losses of samples whose number has this value at this place; 0 comes first."""
        z = z.reshape(self._ids.shape)
        self.finite = self.finite and bool(z.isfinite().all())
        there = z != 0
        if not value:
            self._zeros += there.long() << place
        if value:
            self._mixed = self._mixed or bool((there & self._before).any())
            self._ids += there.long() << place
            self._known += there | self._before
        self._before = there

    def owner(self) -> Owner | None:
        """Whom each entry belongs to, or None where samples mix."""
        bits = bits_of(self._batch)
        ids = torch.where(self._known == bits, self._ids, NOBODY)
        partly = (self._known > 0) & (self._known < bits)  # zero in some pass with its sample: it cancels, underflows
        if self._mixed or bool((ids >= self._batch).any()):
            return None
        for axis in likely_axes(ids.shape, self._batch):
            along = along_axis(ids, axis)
            if along is None:
                continue
            filled = fill(along, self._batch)
            each = filled.view([-1 if d == axis else 1 for d in range(ids.ndim)])
            # what was seen in some passes alone is that of the sample which the pattern of the others says
            if not bool((partly & ((each == NOBODY) | (self._ids & ~each | self._zeros & each).bool())).any()):
                return Owner(axis, filled, self._batch)
        return None if bool(partly.any()) else Owner(None, ids, self._batch)
