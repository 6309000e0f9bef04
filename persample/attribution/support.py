"""Whose rows are whose by where gradients are zero: slower than `persample.attribution.probing`, and never deceived.

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

from persample.attribution.owner import NOBODY, Output, Owner, along_axis, arranged
from persample.attribution.probing import Visit


def supported(
    watch: Callable[[Tensor, Visit], None],
    losses: Tensor,
    outputs: Sequence[Output | None],
    finite: Callable[..., AbstractContextManager[object]],
    before: Sequence[Owner | None] | None = None,
) -> list[Owner | None]:
    """Returns the owner at each of several places, None where samples mix.

    Args:
        watch: `watch(v, visit)` shows the gradients of Σ_b v_b ℓ_b one by one, and keeps none.
        losses: [B].
        outputs: what is known of each gradient; None where there is none.
        finite: as of `persample.attribution.probing.attribute`.
        before: what that has found, which is taken where entries are not finite and no pass shows whose they are.
    """
    found = _passes(watch, losses, outputs)
    lost = [None if support is None else support.lost for support in found]
    if any(each is not None and bool(each.any()) for each in lost):
        with finite(lambda: watch(torch.ones_like(losses), lambda place, z: None)):
            found = _passes(watch, losses, outputs)
    triples = zip(found, lost, before or [None] * len(found), strict=True)
    return [None if support is None else support.owner(each, owner) for support, each, owner in triples]


def supported_by(
    backward: Callable[[Tensor], Sequence[Tensor | None]],
    losses: Tensor,
    outputs: Sequence[Output | None],
    finite: Callable[..., AbstractContextManager[object]],
    before: Sequence[Owner | None] | None = None,
) -> list[Owner | None]:
    """The same, by a backward pass that returns the gradients all at once."""

    def watch(weights: Tensor, visit: Visit) -> None:
        for place, z in enumerate(backward(weights)):
            if z is not None:
                visit(place, z)

    return supported(watch, losses, outputs, finite, before)


def _passes(
    watch: Callable[[Tensor, Visit], None], losses: Tensor, outputs: Sequence[Output | None]
) -> list[_Support | None]:
    """What the passes show at each place."""
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
    return found


def bits_of(batch: int) -> int:
    """How many bits the samples' numbers have."""
    return max(batch - 1, 0).bit_length()


SMALL = 2.0**24
"""Times the smallest number of the format: less than that, and a gradient loses digits, or is zero, in some passes."""


class _Support:
    """In which passes each entry of one gradient was not zero."""

    def __init__(self, output: Output, batch: int) -> None:
        self._batch = batch
        self._ids = torch.zeros(output.shape, dtype=torch.long, device=output.device)
        self._known, self._zeros = torch.zeros_like(self._ids), torch.zeros_like(self._ids)
        self._before, self._sizable = (torch.zeros_like(self._ids, dtype=torch.bool) for _ in range(2))
        self._mixed = False
        self.lost = torch.zeros_like(self._before)
        """Entries that were not finite."""

    def add(self, place: int, value: int, z: Tensor) -> None:
        """Takes the gradient of the losses of samples whose number has this value at this place; 0 comes first."""
        z = z.reshape(self._ids.shape)
        self.lost |= ~z.isfinite()
        there = (z != 0) & z.isfinite()
        self._sizable |= z.abs() > SMALL * torch.finfo(z.dtype).tiny
        if not value:
            self._zeros += there.long() << place
        if value:
            self._mixed = self._mixed or bool((there & self._before).any())
            self._ids += there.long() << place
            self._known += there | self._before
        self._before = there

    def owner(self, needed: Tensor | None, before: Owner | None) -> Owner | None:
        """Whom each entry belongs to, or None where samples mix, or an entry that is `needed` is nobody's."""
        bits = bits_of(self._batch)
        ids = torch.where((self._known == bits) & ~self.lost, self._ids, NOBODY)
        if self._mixed or bool((ids >= self._batch).any()):
            return None
        if before is not None and needed is not None:
            ids = torch.where((needed | self.lost) & (ids == NOBODY), before.of_entries(ids.shape), ids)
        unknown = self.lost & (ids == NOBODY)
        if bool(unknown.any()) and sum(along_axis(ids, axis) is not None for axis in range(ids.ndim)) > 1:
            return None  # rows can be read in several ways
        owner = arranged(ids, self._batch)
        each = owner.of_entries(ids.shape)
        nobody = each == NOBODY
        # Zero in some pass with its own sample: rounding of what cancels, at nobody's loss; or it underflows. Then it
        # is that of the sample that the pattern of the others says, unless it was seen without that one.
        partly = (self._known > 0) & (self._known < bits) & ~self.lost
        without = ((self._ids & ~each) | (self._zeros & each)).bool()
        lost = partly & ((nobody & ~self._sizable) | (~nobody & without))
        needed = lost if needed is None else (needed | self.lost) & nobody | lost
        return None if bool(needed.any()) else owner
