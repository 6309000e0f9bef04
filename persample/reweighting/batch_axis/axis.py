"""Where the samples of a layer's calls are: what the user says, what is proven or tried out, and how a call is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from persample.reweighting.autograd import Uses
from persample.reweighting.batch_axis.folded import Folded, Reading, by_size, foldings, sized, unfolded
from persample.reweighting.batch_axis.segments import Segment, assembled
from persample.reweighting.batch_axis.uncertain import LEAVE_OUT, disagreeing, uncertain


@dataclass(eq=False, kw_only=True)
class SampleAxis:
    """What is known of the samples of a layer, by its path."""

    path: str
    where: int | Folded | None
    """What the user said of its samples."""
    shared: str | None = None
    """Why its gradient has no rows, whatever the shapes say; None where it has."""
    _found: bool = False
    """Whether the axis was told by its size or by a trial; not by the user."""
    readings: dict[tuple[int, tuple[int, ...]], Reading] = field(default_factory=dict)
    """By batch size and shape of an output: what trials told."""
    _on_axis: dict[tuple[int, tuple[int, ...]], Reading] = field(default_factory=dict)
    """The same, as long as all of them are the one axis."""
    segments: dict[tuple[int, int, int, tuple[int, ...]], Segment] = field(default_factory=dict)
    """By batch size, how many calls there are, which of them it is, and the shape of its output: where it was called on
    parts of the batch."""
    routed: bool = False
    """Whether data place its rows, so that each batch says anew whose they are."""
    selected: bool = False
    """Whether its input was selected from other rows, in the first forward pass."""
    placed: bool = False
    """Whether data say where its rows lie, as far as the first forward pass has shown: masks, packed sequences."""
    left_out: bool = False
    """Whether it could not be read in the last batch, and the policy did not ask for it: it is tried out no more."""
    foreign: bool = False
    """Whether a trial has shown rows, as many as samples, that belong to others."""
    note: str = "no trial with other samples was made of it"
    """What a trial showed that did not tell how to read its output, or why there was none."""

    def __post_init__(self) -> None:
        self.axis = self.where if isinstance(self.where, int) else None
        """The axis that counts samples in all of its calls; None where it is not known yet, or rows are folded."""
        self._last: Reading | None = None

    @property
    def linear(self) -> bool:
        """Whether it is linear, so that any axis but the last may count samples."""
        raise NotImplementedError(f"{type(self).__name__} defines linear")

    @property
    def space(self) -> int | None:
        """How many axes of space a convolution has; None for a linear layer."""
        raise NotImplementedError(f"{type(self).__name__} defines space")

    def candidates(self, shape: tuple[int, ...], batch: int) -> list[Reading]:
        """The ways in which an output of that shape may hold so many samples."""
        return foldings(self.rows(shape), batch)

    def rows(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of an output of that shape that may hold samples."""
        return shape[:-1] if self.space is None else shape[: len(shape) == self.space + 2]

    def unsure(self, shape: tuple[int, ...], batch: int | None) -> list[Reading]:
        """The candidates among which a trial may have to choose; empty where it is known how to read the output."""
        if isinstance(self.where, Folded) or batch is None or batch < 2 or (batch, shape) in self.readings:
            return []
        if self.left_out:
            return []
        if self.axis is not None and (not self._found or shape[self.axis : self.axis + 1] == (batch,)):
            return []
        return self.candidates(shape, batch)

    def several_batches(self, shape: tuple[int, ...]) -> bool:
        """Whether an output of that shape has held several numbers of samples."""
        return sum(known == shape for _, known in self.readings) > 1

    def forget(self) -> None:
        """Nothing is known of its samples, but for what the user has said."""
        if self.provable:
            self.axis, self._last, self._found = None, None, False
            for each in (self.readings, self._on_axis, self.segments):
                each.clear()

    @property
    def untold(self) -> bool:
        """Whether neither the user nor the first batch has said where its samples are."""
        return self.where is None and self.shared is None and not self.left_out

    @property
    def provable(self) -> bool:
        """Whether the graph behind the model's output may tell where its samples are: rows that data have selected,
        or placed, may be as many as samples by chance."""
        return self.untold and not (self.selected or self.placed)

    def forget_axis(self, shape: tuple[int, ...]) -> None:
        """What was found of other batches does not hold for the only sample of this one, unless it has one row."""
        if self.axis is not None and self._found and shape[self.axis : self.axis + 1] != (1,):
            self.axis = None

    def settle(self, shape: tuple[int, ...], batch: int, reading: Reading | None) -> None:
        """A trial has told how to read an output; None: that it is not to be read by its size."""
        if reading is not None and self.placed and not reading.ordinary:
            self.axis, self.foreign = None, True
            self.note = (
                f"in this batch they are {reading.explain()}, but a mask or a packed sequence places them, so that the "
                "next one may be laid out otherwise, in the same shape"
            )
        elif reading is None:
            self.axis, self.foreign = None, True
            self.note = "a trial with other samples showed rows that change with others than their own"
        elif reading.ordinary and not self.readings and self.axis in (None, reading.axis):
            self.axis, self._found = reading.axis, True
            self._on_axis[batch, shape] = reading
        else:
            self.readings |= self._on_axis | {(batch, shape): reading}
            self.axis, self._on_axis = None, {}

    def settle_segments(self, batch: int, calls: int, proven: Mapping[int, Segment]) -> None:
        """It is proven what calls hold of the batch, first call 0, in a forward pass of that many."""
        for number, each in proven.items():
            self.segments[batch, calls, number, each.shape] = each

    def check(self, uses: Uses) -> tuple[list[tuple[Tensor, Tensor]], int]:
        """Returns the uses, emptied, and which of their axes counts samples, when that is certain."""
        found, uses.found = uses.found, []
        together = self._assembled(uses, found) if self.segments or uses.held else None
        if together is not None:
            return together, 0
        if self.axis is None:
            readings = self._readings([tuple(z.shape) for _, z in found], uses.forward.batch)
            if readings:
                self._last, found = readings[-1], unfolded(found, readings, self.space)
                self._agree({z.shape[0] for _, z in found})
                return found, 0
            self.axis, self._found = self._find_axis(tuple(found[-1][1].shape), uses.forward.batch), True
        for _, z in found:
            if self.axis > z.dim() - 2 and self.linear:
                raise ValueError(
                    f"layer '{self.path}' has its samples on axis {self.axis}, but a call of it an output of shape "
                    f"{list(z.shape)}, whose last axis counts features. Give all of its calls the same axes, or call "
                    "two layers that share a weight and have biases of their own."
                )
        if len(found) > 1:
            self._agree({z.shape[self.axis] for _, z in found})
        shape, batch = found[-1][1].shape, uses.forward.batch
        if self._found and batch is not None and shape[self.axis] != batch:
            raise ValueError(
                f"layer '{self.path}' had as many rows as samples on axis {self.axis} of its output in an earlier "
                f"batch, but now its output has shape {list(shape)} for {batch} samples: its rows are no samples, nor "
                f"as many of each ({self.note}). They may be tokens that were selected, or the layer was called apart "
                f"from the model. Leave it out ({LEAVE_OUT}), or give the optimiser (or persample.reweight) "
                f"batch_axis={{'{self.path}': {self.axis}}}: each row is a sample then."
            )
        return found, self.axis

    def _assembled(self, uses: Uses, found: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]] | None:
        """The uses as calls on the whole batch, where it is known which part of the batch each of them had."""
        batch, calls = uses.forward.batch, len(uses.taps)
        numbers = [0] if calls == 1 else uses.numbers
        if batch is None or len(numbers) != len(found):
            return None
        held = [each for number in numbers if (each := uses.held.get(number)) is not None]
        if len(held) == len(found):
            self.routed = True
            return assembled(found, held, batch, self.space)
        shapes = [tuple(z.shape) for _, z in found]
        known = [
            self.segments.get((batch, calls, number, shape)) for number, shape in zip(numbers, shapes, strict=True)
        ]
        segments = [each for each in known if each is not None]
        if segments and len(segments) < len(known):
            self.note = "it is called on parts of the batch, of which it is not known for every call which part it is"
            raise self._uncertain(shapes[known.index(None)], batch)
        return assembled(found, segments, batch, self.space) if segments else None

    def _readings(self, shapes: Sequence[tuple[int, ...]], batch: int | None) -> list[Reading]:
        """How to read each output; empty where one axis counts samples in all of them, or none can be told."""
        readings = [self._reading(shape, batch) for shape in shapes]
        known = [each for each in readings if each is not None]
        if self.readings and len(known) < len(readings):
            raise self._uncertain(shapes[readings.index(None)], batch)
        # A batch of one says nothing of the next batch.
        special = self.readings or isinstance(self.where, Folded) or batch == 1
        return known if len(known) == len(readings) and (special or len(set(known)) > 1) else []

    def _reading(self, shape: tuple[int, ...], batch: int | None) -> Reading | None:
        """How to read an output of that shape; None where it cannot be told."""
        rows = self.rows(shape)
        if isinstance(self.where, Folded):
            reading = sized(self.where, rows[self.where.axis], batch) if self.where.axis < len(rows) else None
            if reading is None:
                raise disagreeing(self.path, shape, batch, self.where)
            return reading
        if not batch or not rows:
            return None
        if batch == 1:
            return Reading(1, rows[0], 0) if rows[0] else None
        return self.readings.get((batch, shape)) or self.by_size(shape, batch)

    def taken(self, batch: int | None, calls: int, number: int, shape: tuple[int, ...]) -> Segment | None:
        """What a call is taken to hold, of so many in a forward pass; None where it cannot be told."""
        if batch is None:
            return None
        segment = self.segments.get((batch, calls, number, shape))
        reading = self._reading(shape, batch) if self.axis is None else Reading(1, 1, self.axis)
        return segment or (None if reading is None else Segment(shape, reading, 0, batch))

    def by_size(self, shape: tuple[int, ...], batch: int) -> Reading | None:
        """The one axis with as many entries as samples, where no other is as likely."""
        return None if self.foreign else by_size(self.candidates(shape, batch))

    def _agree(self, sizes: set[int]) -> None:
        if len(sizes) > 1:
            raise ValueError(
                f"layer '{self.path}' was called with batches of {sorted(sizes)} samples in one forward; "
                "its calls make one gradient per sample only if each has the same samples. Call the model "
                "once per batch."
            )

    def _find_axis(self, shape: tuple[int, ...], batch: int | None) -> int:
        """The axis of the output that counts samples; raises ValueError where that is not certain."""
        found = None if batch is None else self.by_size(shape, batch)
        if found is None:
            raise self._uncertain(shape, batch)
        return found.axis

    def _uncertain(self, shape: tuple[int, ...], batch: int | None) -> ValueError:
        candidates = [] if batch is None else self.candidates(shape, batch)
        return uncertain(self.path, shape, batch, candidates, linear=self.linear, note=self.note)
