"""Rows that are no samples but belong to some: windows, frames, patches, heads or views folded into the batch.

Along one axis of a layer's output the rows are read as [before, batch, after], of which the middle counts samples:

    owner of row r  =  (r // after) % batch

                                                            before   after   owners of 6 rows of 2 samples
    windows, frames, patches    x.flatten(0, 1)                1       3     0 0 0 1 1 1
    views                       torch.cat([x1, x2, x3])        3       1     0 1 0 1 0 1
    ordinary rows                                              1       1     0 1

All rows of a sample are positions of it, so the gradient of a linear layer or a convolution sums over them:
g_b = Σ_{r of b} g_r, and the weighted sum is the ordinary one with c repeated, c[owner].
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from math import isqrt

from torch import Tensor, nn

from persample.blocks.convolution.algorithms import ConvSpec
from persample.blocks.convolution.build import conv_block
from persample.blocks.types import Conv


@dataclass(frozen=True)
class Folded:
    """For `batch_axis=` of `reweight`: an axis of a layer's output whose rows are [before, batch, after].

    Arguments:
        before: how often all samples follow one another, 1 or more; None: as often as there are rows.
        after: how many rows in sequence belong to one sample, 1 or more; None: as many as there are.
        axis: which axis of the output, counted from the front; in a convolution 0.

    By default every sample has its rows in sequence, any number of them. Raises ValueError where both are None or
    one is out of its range.

    >>> windows = nn.Sequential(nn.Unflatten(1, (4, 3)), nn.Flatten(0, 1), nn.Linear(3, 2))  # [B, 12] → [B·4, 3]
    >>> sizes = []
    >>> where = {"2": persample.Folded(after=4)}
    >>> with persample.reweight(windows, lambda layer, grads: sizes.append(grads.batch_size), batch_axis=where):
    ...     windows(torch.randn(5, 12)).sum().backward()
    >>> sizes
    [5]
    """

    before: int | None = 1
    after: int | None = None
    axis: int = 0

    def __post_init__(self) -> None:
        if self.before is None and self.after is None:
            raise ValueError(
                "Folded(before=None, after=None) says nothing: give one of them, after=1 where the samples follow one "
                "another, before=1 where each has its rows in sequence"
            )
        counts = [each for each in (self.before, self.after) if each is not None]
        if not all(isinstance(each, int) for each in (*counts, self.axis)) or min(counts) < 1 or self.axis < 0:
            raise ValueError(f"{self}: before and after are 1 or more, or None, and axes count from the front, 0, 1, …")


@dataclass(frozen=True)
class Reading:
    """An axis of one output whose rows are [before, batch, after]."""

    before: int
    after: int
    axis: int

    @property
    def ordinary(self) -> bool:
        """Whether each row is a sample."""
        return self.before == self.after == 1

    def split(self, tensor: Tensor) -> Tensor:
        """Returns a view [batch, …] of the layer's input or output; unless it is ordinary, with axes for the rest.

        Those stand where the rows were, `before` in front of `after`.
        """
        if self.ordinary:
            return tensor.movedim(self.axis, 0)
        batch = tensor.shape[self.axis] // (self.before * self.after)
        return tensor.unflatten(self.axis, (self.before, batch, self.after)).movedim(self.axis + 1, 0)

    def rows(self, values: Tensor, axes: int) -> Tensor:
        """Returns values [batch] of the samples for a tensor of so many axes, to be multiplied with it."""
        repeated = values.repeat_interleave(self.after).repeat(self.before)
        return repeated.view(-1, *[1] * (axes - 1 - self.axis))

    def explain(self) -> str:
        """Where the samples are, in words."""
        each = f"samples of {self.after} consecutive rows each" if self.after != 1 else "samples"
        times = f", {self.before} times one after another" if self.before != 1 else ""
        return f"{each} on axis {self.axis} of its output{times}"


def sized(given: Folded, rows: int, batch: int | None) -> Reading | None:
    """Returns the reading of an axis of so many rows; None where they do not fit, or no number of samples tells."""
    before, after = given.before, given.after
    if before is None or after is None:
        known = before or after or 1
        if not batch or not rows or rows % (batch * known):
            return None
        rest = rows // (batch * known)
        return Reading(before or rest, after or rest, given.axis)
    fits = rows % (before * after) == 0 if batch is None else rows == before * batch * after
    return Reading(before, after, given.axis) if fits else None


def foldings(shape: Sequence[int], batch: int) -> list[Reading]:
    """Returns every reading of the axes given in `shape`, in which each of `batch` samples has as many rows."""
    found = []
    for axis, size in enumerate(shape):
        if size == batch:
            found.append(Reading(1, 1, axis))
        elif batch and size and size % batch == 0:
            rest = size // batch
            found += [Reading(before, rest // before, axis) for before in _divisors(rest)]
    return found


def _divisors(number: int) -> list[int]:
    small = [each for each in range(1, isqrt(number) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})


def by_size(candidates: Sequence[Reading]) -> Reading | None:
    """Returns the only axis with as many entries as samples, where no other is as likely; None where it is not certain.

    None is as likely as the front one, or where no other has a multiple of them.
    """
    ordinary = [each for each in candidates if each.ordinary]
    return ordinary[0] if len(ordinary) == 1 and (ordinary[0].axis == 0 or len(candidates) == 1) else None


def usual(known: Set[Reading], candidates: Sequence[Reading]) -> Reading | None:
    """The candidate that goes on as earlier batches were read: rows in sequence, or one after another, or the same.

    None where they were read in several ways.
    """
    candidates = [each for each in candidates if {other.axis for other in known} == {each.axis}]
    same = [each for each in candidates if known == {each}]
    for kind in ("before", "after"):
        if all(getattr(each, kind) == 1 for each in known):
            same += [each for each in candidates if getattr(each, kind) == 1]
    return same[0] if same else None


def unfolded(
    uses: Sequence[tuple[Tensor, Tensor]], readings: Sequence[Reading], space: int | None
) -> list[tuple[Tensor, Tensor]]:
    """Returns (x, z) of each call with samples on axis 0, and what else the rows hold on axes of their own.

    Those of a convolution are one, the images of a sample, [batch, images, channels, *space]; with three axes of space
    each image is a call, because there is no convolution of four.

    Arguments:
        uses: (x, z) of each call, as the layer received and returned them.
        readings: of each call.
        space: how many axes of space a convolution has; None for a linear layer.
    """
    result: list[tuple[Tensor, Tensor]] = []
    for (x, z), reading in zip(uses, readings, strict=True):
        x, z = reading.split(x), reading.split(z)
        if space is not None and not reading.ordinary:
            x, z = x.flatten(1, 2), z.flatten(1, 2)
            if space == 3:
                result += zip(x.unbind(1), z.unbind(1), strict=True)
                continue
        result.append((x, z))
    return result


def image_block(module: nn.Module, x: Tensor, z: Tensor) -> Conv:
    """Returns the block of a convolution of several images a sample, [batch, images, channels, *space].

    The images are one more axis of space, along which the kernel has one element: g_b then sums over them as over
    all positions. The block's weight has that element, too: [out, in, 1, *kernel].
    """
    flat = conv_block(module, x.flatten(0, 1), z.flatten(0, 1))
    of = flat.spec
    spec = ConvSpec(
        weight_shape=(*of.weight_shape[:2], 1, *of.weight_shape[2:]),
        stride=(1, *of.stride),
        padding=(0, *of.padding),
        dilation=(1, *of.dilation),
        transposed=of.transposed,
        output_padding=(0, *of.output_padding),
        groups=of.groups,
    )
    x, z = (each.unflatten(0, x.shape[:2]).transpose(1, 2) for each in (flat.x, flat.z))
    return Conv(x, z, spec)
