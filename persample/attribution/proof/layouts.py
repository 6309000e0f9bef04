"""Which samples a tensor holds, and where: by a pattern, or row by row; cut, viewed and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from jaxtyping import Int
from torch import Tensor

from persample.attribution.owner import NOBODY, Owner
from persample.attribution.proof.batching_rules import AxisLayout, axis_layout, stride_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """A pattern: entry i, counted in row-major order, belongs to sample first + (i // stride) mod count."""

    stride: int
    first: int
    count: int

    def axis_layout(self, shape: Shape) -> AxisLayout | None:
        """The axis along which its samples lie."""
        return axis_layout(self.stride, shape, self.count)


@dataclass(frozen=True, eq=False)
class Rows:
    """A list: row i along `axis` belongs to sample ids[i]; `NOBODY` where nothing depends on it."""

    axis: int
    ids: Int[Tensor, " rows"]

    @classmethod
    def of_nobody(cls, shape: Shape, device: torch.device) -> Rows:
        """Of a tensor that nothing depends on."""
        return cls(0, torch.full(shape[:1], NOBODY, device=device))

    @cached_property
    def nobodys(self) -> bool:
        """Whether nothing depends on any row."""
        return bool((self.ids == NOBODY).all())

    def alone(self, shape: Shape) -> Place | Rows:
        """The pattern that says the same, where all rows are one sample's."""
        first = int(self.ids[0]) if len(self.ids) else NOBODY
        return whole(first, shape) if first != NOBODY and bool((self.ids == first).all()) else self

    @cached_property
    def _owners(self) -> dict[int, Owner]:
        return {}

    def owner(self, batch: int) -> Owner:
        """The same as an owner; one for all that share the list, so that places are found once."""
        if batch not in self._owners:
            self._owners[batch] = Owner(self.axis, self.ids, batch)
        return self._owners[batch]


@dataclass(frozen=True, eq=False)
class Slab:
    """A part of a tensor, of `length` along `dim` from `start` on, and whose it is."""

    dim: int
    start: int
    length: int
    place: Place | Rows

    def shape(self, of: Shape) -> Shape:
        """Its shape in a tensor of that shape."""
        return (*of[: self.dim], self.length, *of[self.dim + 1 :])

    def agrees(self, place: Place, shape: Shape) -> bool:
        """Whether it is this part's, if the tensor is of that shape and place."""
        part = cut(place, shape, self.dim, self.start, self.length)
        if isinstance(self.place, Place):
            return part == self.place
        return part is not None and covers(part, self.place, self.shape(shape))


def whole(first: int, shape: Shape) -> Place:
    """Everything belongs to one sample."""
    return Place(max(1, prod(shape)), first, 1)


def rows_of(place: Place, shape: Shape, device: torch.device, axis: int | None = None) -> Rows | None:
    """The list that says the same as a pattern; None where it is along no axis, or not along the one that is given."""
    if place.count == 1 and shape:
        axis = 0 if axis is None else axis
        return Rows(axis, torch.full((shape[axis],), place.first, device=device))
    at = place.axis_layout(shape)
    if at is None or axis not in (None, at.axis):
        return None
    ids = torch.arange(shape[at.axis], device=device).div(at.inner, rounding_mode="floor") % place.count
    return Rows(at.axis, ids + place.first)


def covers(place: Place, rows: Rows, shape: Shape) -> bool:
    """Whether a pattern says what a list says, wherever that says something."""
    if rows.nobodys:
        return True
    same = rows_of(place, shape, rows.ids.device, rows.axis)
    return same is not None and bool(((rows.ids == NOBODY) | (rows.ids == same.ids)).all())


def viewed(rows: Rows, shape: Shape, as_shape: Shape) -> Rows | None:
    """The list of the same entries, in row-major order, in another shape; None where it is along none of its axes."""
    if rows.axis < len(as_shape) and shape[rows.axis :] == as_shape[rows.axis :]:
        return rows
    block = prod(shape[rows.axis + 1 :])
    if not prod(shape):
        return None
    sequence = rows.ids.repeat(prod(shape[: rows.axis]))
    for axis in range(len(as_shape)):
        below = prod(as_shape[axis + 1 :])
        if block % below == 0:
            ids = sequence.repeat_interleave(block // below)
        elif below % block == 0:
            groups = sequence.view(-1, below // block)
            ids = groups[:, 0]
            if not bool((groups == ids[:, None]).all()):
                continue
        else:
            continue
        ids = ids.view(-1, as_shape[axis])
        if len(ids) and bool((ids == ids[0]).all()):
            return Rows(axis, ids[0])
    return None


def cut(place: Place, shape: Shape, dim: int, start: int, length: int) -> Place | None:
    """Whose a part of a tensor is; None where it is not one run of samples."""
    part = (*shape[:dim], length, *shape[dim + 1 :])
    if place.count == 1:
        return whole(place.first, part)
    at = place.axis_layout(shape)
    if not length:
        return None
    if at is None:
        return _cut_over_axes(place, shape, dim, start, length)
    if at.axis != dim:
        return Place(stride_of(at, part), place.first, place.count)
    if start % at.inner or length % at.inner:
        return None
    begin, number = start // at.inner, length // at.inner
    below = stride_of(at, part)
    if begin % place.count == 0 and number % place.count == 0:
        return Place(below, place.first, place.count)
    if begin // place.count != (begin + number - 1) // place.count:
        return None
    first = place.first + begin % place.count
    return whole(first, part) if number == 1 else Place(below, first, number)


def cut_rows(rows: Rows, dim: int, start: int, length: int) -> Rows:
    """The list of a part of a tensor."""
    return Rows(dim, rows.ids[start : start + length]) if rows.axis == dim else rows


def _cut_over_axes(place: Place, shape: Shape, dim: int, start: int, length: int) -> Place | None:
    """As `cut`, of a tensor whose samples are spread over several axes."""
    axes = next((k for k in range(len(shape), -1, -1) if prod(shape[k:]) > place.stride), 0) + 1
    below = prod(shape[axes:])
    if dim >= axes or place.stride % below:
        return None
    ids = torch.arange(prod(shape[:axes])).div(place.stride // below, rounding_mode="floor") % place.count
    part = ids.view(shape[:axes]).narrow(dim, start, length).flatten().tolist()
    inner = next((number for number, each in enumerate(part) if each != part[0]), len(part))
    count = len(set(part))
    if part != [part[0] + number // inner % count for number in range(len(part))]:
        return None
    first = place.first + part[0]
    return whole(first, (len(part), below)) if count == 1 else Place(inner * below, first, count)


def joined(given: Sequence[Place | Rows | Slab], shape: Shape, batch: int, device: torch.device) -> Place | Rows | None:
    """Whose a tensor is, of which that is known from those who use it or parts of it; None where they disagree.

    A pattern if there is one; else a list, where one of these is a list.
    """
    if len(given) == 1 and isinstance(given[0], Rows):
        return given[0]
    places = list(dict.fromkeys(each for each in given if isinstance(each, Place)))
    lists = [each for each in given if isinstance(each, Rows)]
    slabs = [each for each in given if isinstance(each, Slab)]
    for place in places or [guess for slab in slabs[:1] for guess in _of_slab(slab, shape)]:
        if (
            place.first >= 0
            and place.first + place.count <= batch
            and all(other == place for other in places)
            and all(slab.agrees(place, shape) for slab in slabs)
            and all(covers(place, each, shape) for each in lists)
        ):
            return place
    rows = _merged(given, shape, device)
    return None if rows is None else rows.alone(shape)


def _merged(given: Sequence[Place | Rows | Slab], shape: Shape, device: torch.device) -> Rows | None:
    lists = [each.place if isinstance(each, Slab) else each for each in given]
    rows = sorted((each for each in lists if isinstance(each, Rows)), key=lambda each: each.nobodys)
    axes = [each.axis for each in rows[:1]]
    if not axes:
        return None
    found = torch.full((shape[axes[0]],), NOBODY, device=device)
    for each in given:
        ids = _listed(each, shape, axes[0], device)
        if ids is None or bool(((found != NOBODY) & (ids != NOBODY) & (found != ids)).any()):
            return None
        found = torch.maximum(found, ids)
    return Rows(axes[0], found)


def _listed(given: Place | Rows | Slab, shape: Shape, axis: int, device: torch.device) -> Tensor | None:
    """The samples along an axis, by what is known of all of a tensor or of a part."""
    if isinstance(given, Rows):
        if given.axis == axis:
            return given.ids
        return Rows.of_nobody(shape[axis:], device).ids if given.nobodys else None
    if isinstance(given, Place):
        rows = rows_of(given, shape, device, axis)
        return None if rows is None else rows.ids
    part = _listed(given.place, given.shape(shape), axis, device)
    if part is None or given.dim != axis:
        return part
    ids = torch.full((shape[axis],), NOBODY, device=device)
    ids[given.start : given.start + given.length] = part
    return ids


def _of_slab(slab: Slab, shape: Shape) -> Iterator[Place]:
    """Whose a tensor may be, given one part of it."""
    part, place = slab.shape(shape), slab.place
    if isinstance(place, Rows):
        return
    at = place.axis_layout(part)
    if place.count == 1:
        yield whole(place.first, shape)
        at = AxisLayout(slab.dim, slab.length)  # as it may be cut sample by sample
    if at is None:
        return
    stride = stride_of(at, shape)
    if at.axis != slab.dim:
        yield Place(stride, place.first, place.count)
    elif slab.length == place.count * at.inner and not slab.start % at.inner and not shape[slab.dim] % at.inner:
        yield Place(stride, place.first - slab.start // at.inner, shape[slab.dim] // at.inner)
        yield Place(stride, place.first, place.count)  # one round of several
    else:
        yield Place(stride, place.first, place.count)
