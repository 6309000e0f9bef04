"""A weight that `reweight` reweights: a module's own, or one that a function is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from persample import prepared
from persample.folded import Folded, Reading, by_size, foldings, sized, unfolded
from persample.layer_sum import Parameters, layer_sum
from persample.layers import LayerGrads
from persample.taps import Uses
from persample.uncertain import LEAVE_OUT, disagreeing, uncertain


@dataclass(eq=False)
class Layer:
    """A layer by its path; the state that its calls in training share.

    For a function `module` is None, `source` returns its (weight, bias), which may be parts of parameters, and
    `owners` are the parameters themselves.
    """

    path: str
    module: nn.Module | None
    where: int | Folded | None
    """What the user said of its samples."""
    source: Callable[[], Parameters] | None = None
    owners: tuple[Tensor, ...] = ()
    off: list[nn.Parameter] = field(default_factory=list)
    called: bool = False
    shared: str | None = None
    """Why its gradient has no rows, whatever the shapes say; None where it has."""
    _prepared: tuple[Any, Any] = None, None
    _found: bool = False
    """Whether the axis was told by its size or by a trial; not by the user."""
    readings: dict[tuple[int, tuple[int, ...]], Reading] = field(default_factory=dict)
    """By batch size and shape of an output: what trials told."""
    besides: str = ""
    """What else uses its weight or bias in the first batch, by autograd's names; empty where nothing does."""
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
    opaque: bool = False
    """Not to be traced by torch.compile: called several times, or in another graph than the model's entry."""

    def __post_init__(self) -> None:
        self.axis = self.where if isinstance(self.where, int) else None
        """The axis that counts samples in all of its calls; None where it is not known yet, or rows are folded."""
        self._last: Reading | None = None

    @property
    def linear(self) -> bool:
        """Whether it is linear, so that any axis but the last may count samples."""
        return self.module is None or isinstance(self.module, nn.Linear)

    def parameters(self) -> list[Any]:
        """[weight, bias or None], or an empty list where the layer is to take the plain gradient."""
        weight, bias = self._own()
        if self._why_plain(weight) is not None:
            return []
        return [weight, bias if bias is not None and bias.requires_grad else None]

    def _own(self) -> Parameters:
        if self.module is None:
            assert self.source is not None, "a function's layer is made with one"
            return self.source()
        return self.module._parameters.get("weight"), self.module._parameters.get("bias")

    def members(self) -> list[Tensor]:
        """The parameters that the layer's gradient belongs to, frozen ones included."""
        return list(self.owners) if self.module is None else [each for each in self._own() if each is not None]

    def why_plain(self) -> str | None:
        """Why the layer takes the plain gradient, None if it does not."""
        return self._why_plain(self._own()[0])

    def _why_plain(self, own: Tensor | None) -> str | None:
        if self.shared is not None:
            return self.shared
        if own is None or (self.module is not None and not own.is_leaf):
            return "its weight is computed from other parameters (parametrised)"
        if own.is_complex():
            return "its weight is complex"
        if not own.requires_grad and all(own is not parameter for parameter in self.off):
            return "its weight is frozen"
        return None

    def explain(self) -> str:
        """What happens to its gradient, and why."""
        plain = self.why_plain()
        if plain is not None:
            return f"plain: {plain}"
        if not self.called:
            return "plain so far: its forward has not been called (another module may use its weight)"
        last = self._last if self.axis is None else Reading(1, 1, self.axis)
        axis = "" if last is None else f", {last.explain()}"
        alone = f", for its calls alone: {self.besides} uses its weight, too" if self.besides else ""
        return f"reweighted{axis}{alone}"

    def switch_off(self) -> None:
        """While the layer's module runs, its parameters need no gradient."""
        if self.off:
            self.switch_on()  # left over from a forward pass that Ctrl-C ended
        self.off = [each for each in self.parameters() if each is not None]
        for parameter in self.off:
            parameter.requires_grad = False

    def switch_on(self) -> None:
        """Ends `switch_off`."""
        for parameter in self.off:
            parameter.requires_grad = True
        self.off = []

    def candidates(self, shape: tuple[int, ...], batch: int) -> list[Reading]:
        """The ways in which an output of that shape may hold so many samples."""
        return foldings(self._rows(shape), batch)

    def _rows(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of an output of that shape that may hold samples."""
        return shape[:-1] if self._space is None else shape[: len(shape) == self._space + 2]

    @property
    def _space(self) -> int | None:
        """How many axes of space a convolution has; None for a linear layer."""
        module: Any = self.module
        return None if self.linear else len(module.kernel_size)

    def unsure(self, shape: tuple[int, ...], batch: int | None) -> list[Reading]:
        """The candidates among which a trial may have to choose; empty where it is known how to read the output."""
        if isinstance(self.where, Folded) or batch is None or batch < 2 or (batch, shape) in self.readings:
            return []
        if self.left_out:
            return []
        if self.axis is not None and (not self._found or shape[self.axis : self.axis + 1] == (batch,)):
            return []
        return self.candidates(shape, batch)

    def usual(self, candidates: Sequence[Reading]) -> Reading | None:
        """The candidate that goes on as earlier batches were read: rows in sequence, or one after another, or the same.

        None where they were read in several ways.
        """
        known = set(self.readings.values())
        candidates = [each for each in candidates if {other.axis for other in known} == {each.axis}]
        same = [each for each in candidates if known == {each}]
        for kind in ("before", "after"):
            if all(getattr(each, kind) == 1 for each in known):
                same += [each for each in candidates if getattr(each, kind) == 1]
        return same[0] if same else None

    def several_batches(self, shape: tuple[int, ...]) -> bool:
        """Whether an output of that shape has held several numbers of samples."""
        return sum(known == shape for _, known in self.readings) > 1

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
        elif reading.ordinary and not self.readings:
            self.axis, self._found = reading.axis, True
        else:
            self.axis, self.readings[batch, shape] = None, reading

    def check(self, uses: Uses) -> list[tuple[Tensor, Tensor]]:
        """Returns the uses, emptied, when it is certain which of their axes counts samples.

        That is `axis`; 0 where `axis` is None.
        """
        found, uses.found = uses.found, []
        if self.axis is None:
            readings = self._readings([tuple(z.shape) for _, z in found], uses.forward.batch)
            if readings:
                self._last, found = readings[-1], unfolded(found, readings, self._space)
                self._agree({z.shape[0] for _, z in found})
                return found
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
        return found

    def sum(self, found: Sequence[tuple[Tensor, Tensor]], needed: Sequence[bool], c: Tensor) -> Parameters:
        """Returns the (weight, bias) parts of Σ_b c_b g_b."""
        if len(found) > 1 or self.axis is None:
            return layer_sum(self.module, found, needed, self.axis or 0, c)
        [(x, z)] = found
        key = prepared.signature(self.module, x, z, needed, self.axis)
        if key != self._prepared[0]:
            self._prepared = key, prepared.prepare(self.module, x, z, needed, self.axis)
        return self._prepared[1](x, z, c)

    def plain(self, uses: Uses, needed: Sequence[bool]) -> Parameters:
        """Returns the (weight, bias) gradients of the sum over everything."""
        found, uses.found = uses.found, []
        return layer_sum(self.module, found, needed, 0)

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
        rows = self._rows(shape)
        if isinstance(self.where, Folded):
            reading = sized(self.where, rows[self.where.axis], batch) if self.where.axis < len(rows) else None
            if reading is None:
                raise disagreeing(self.path, shape, batch, self.where)
            return reading
        if not batch or not rows:
            return None
        if batch == 1:
            return Reading(1, rows[0], 0) if rows[0] else None
        return self.readings.get((batch, shape)) or self._by_size(shape, batch)

    def _by_size(self, shape: tuple[int, ...], batch: int) -> Reading | None:
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
        found = None if batch is None else self._by_size(shape, batch)
        if found is None:
            raise self._uncertain(shape, batch)
        return found.axis

    def _uncertain(self, shape: tuple[int, ...], batch: int | None) -> ValueError:
        candidates = [] if batch is None else self.candidates(shape, batch)
        return uncertain(self.path, shape, batch, candidates, linear=self.linear, note=self.note)

    def combine(self, grads: LayerGrads, answer: Any) -> Parameters:
        """Returns the (weight, bias) gradients that the policy's answer stands for."""
        if answer is None:
            return grads.weighted_sum()
        if isinstance(answer, tuple) and len(answer) == 2:
            return answer
        self.check_factors(answer, grads.batch_size)
        return grads.weighted_sum(answer)

    def check_factors(self, answer: Any, batch: int) -> None:
        """Raises ValueError unless the answer is a tensor [B]."""
        if not isinstance(answer, Tensor) or answer.shape != (batch,):
            returned = f"shape {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
            raise ValueError(
                f"the policy returned {returned} for layer '{self.path}'; allowed are None (the plain "
                f"gradient), a tensor of shape [{batch}], one factor per sample, and a pair of "
                "the gradients of weight and bias themselves."
            )
