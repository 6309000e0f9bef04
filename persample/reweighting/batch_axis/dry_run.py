"""Which rows of a layer's output belong to which sample, where sizes do not tell: tried out on the model itself.

Replace some samples of the model's input by others: in the output of every layer that is before any coupling of
samples, the rows of those change and no others. The samples are numbered; for each bit of the number those are
replaced that have it, then those that have not, so that a row that changes tells its owner's number bit by bit:

    sample            0 1 2 3      a reading is [before, batch, after] of an axis (`folded`); one that says
    bit 0, replaced   · × · ×      of any row that changes that its sample was not replaced is out
    bit 0, the others × · × ·
    …

A trial takes 1 + 2 log₂ B runs without gradients at most; random numbers and buffers are as before.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from persample.blocks.precision import full_precision
from persample.reweighting.batch_axis.folded import Reading, by_size

Shape = tuple[int, ...]
Key = tuple[Any, Shape]
"""A layer, and the shape of an output of it."""
Run = Callable[[tuple, dict], Mapping[Any, list[tuple[Shape, Tensor]]]]
"""(args, kwargs) of the model → by layer the shapes and the marks of its outputs."""


@contextmanager
def dry_run(model: nn.Module) -> Iterator[None]:
    """Within the context the model can be run as if it had not been: no graph, and its state is put back."""
    devices = sorted({each.device.index or 0 for each in model.parameters() if each.device.type == "cuda"})
    # Exchanged, not written back: the graph of the pass before may hold them, and tells when they are written to.
    places = [(module._buffers, name, own) for module in model.modules() for name, own in module._buffers.items()]
    copies = {id(own): own.clone() for _, _, own in places if own is not None}
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=devices), _other_random_numbers(), torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)  # it calls no module
        try:
            for buffers, name, own in places:
                buffers[name] = None if own is None else copies[id(own)]
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for buffers, name, own in places:
                buffers[name] = own


@contextmanager
def _other_random_numbers() -> Iterator[None]:
    """Puts back those of Python and, where it is loaded, of numpy: layers are left out at random by them, too."""
    state, numpy = random.getstate(), sys.modules.get("numpy")
    other = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(other)


def mark(output: Tensor, linear: bool) -> Tensor:
    """Returns a number for each row of an output, which changes with it: [*axes but the last], or [images]."""
    rows = full_precision(output) if linear else full_precision(output).flatten(1)
    # Outputs of all layers at once would be as many bytes as their activations.
    one = torch.rand(rows.shape[-1], generator=torch.Generator().manual_seed(0), dtype=rows.dtype)
    with torch.autocast(rows.device.type, enabled=False):  # halves would hide small changes
        return rows @ one.to(rows.device)


def readings(
    model: nn.Module,
    run: Run,
    args: tuple,
    kwargs: dict,
    candidates: Mapping[Key, Sequence[Reading]],
    batch: int,
    confirmed: Mapping[Key, Reading | None] | None = None,
    selected: Mapping[Key, float] | None = None,
    axis: int = 0,
) -> dict[Key, Reading | None]:
    """Returns for each output the one of its candidates that all rows agree with; undecided ones are left out.

    None for one that has as many rows as there are samples, of which some belong to other samples.

    Arguments:
        model: its modules are put into evaluation mode where the mode of training leaves outputs undecided
            (batch normalisation couples samples), and back.
        run: runs the model once, within `dry_run`.
        args, kwargs: what the model was called with. The first tensor with `batch` samples on its axis is changed;
            the next (it may be a mask, and its axis no batch) only for layers that do not depend on the first; then
            all of them together.
        candidates: by layer and shape.
        batch: number of samples B, 2 or more.
        confirmed: outputs of layers that have been read folded before, with the reading that goes on so, if there is
            one. It need not be followed to the last bit, and is taken where nothing speaks against it.
        selected: outputs of rows that were selected from others: None, too, where they change and nothing is decided.
            With the rounding of theirs: where samples are replaced, others are multiplied in other company, and of that
            their rows change in their last digits.
        axis: of tensors that the model is called with, which counts samples; 0 in those where it has another size.
    """
    found: dict[Key, Reading | None] = {}
    touched: set[Key] = set()
    modes = [(module, module.training) for module in model.modules()]
    sure, selected = dict(confirmed or {}), selected or {}
    try:
        for training in (True, False):
            left = {key: each for key, each in candidates.items() if key not in found}
            if left and (training or any(was for _, was in modes)):
                for module, was in modes:
                    module.training = was and training
                new, touched = _by_inputs(model, run, args, kwargs, left, batch, sure, selected, axis)
                found |= new
    finally:
        for module, was in modes:
            module.training = was
    mixed = (key for key in selected if key in touched and key not in found and by_size(candidates[key]) is not None)
    return found | dict.fromkeys(mixed)


class _Evidence:
    """What is known of the rows of the outputs of a layer that have one shape."""

    def __init__(
        self,
        candidates: Sequence[Reading],
        shape: Shape,
        batch: int,
        thorough: bool,
        usual: Reading | None,
        rounding: float,
    ) -> None:
        self._rounding = rounding
        self.left, self._batch, self._thorough, self._usual = list(candidates), batch, thorough, usual
        self._before: list[Tensor] = []
        self._ordinary = by_size(candidates)
        self._lit = {each.axis: torch.zeros(shape[each.axis], dtype=torch.bool) for each in candidates}
        self.foreign = False
        """Whether rows that are as many as samples change with others alone, or their number does."""

    @property
    def touched(self) -> bool:
        """Whether any row has changed."""
        return any(bool(lit.any()) for lit in self._lit.values())

    @property
    def open(self) -> bool:
        """Whether it has to be followed further."""
        return len(self.left) > 1 or any(self._thorough and not each.ordinary for each in self.left)

    def add(self, before: list[Tensor], after: Sequence[list[Tensor] | None], half: Tensor) -> None:
        """The outputs before, and after the samples of a half [batch] were replaced, and after the others were."""
        self._before, shapes = before, [each.shape for each in before]
        self.foreign |= None in after and self._ordinary is not None
        if any(each is None or [mark.shape for mark in each] != shapes for each in after):
            self.left = []
            return
        for one, *others in zip(before, *(each for each in after if each is not None), strict=True):
            differences = [self._differences(one, other).cpu() for other in others]
            for axis, lit in self._lit.items():
                first, second = (each.movedim(axis, 0).reshape(len(lit), -1).any(1) for each in differences)
                lit |= first | second
                for reading in [each for each in self.left if each.axis == axis]:
                    mine = half[torch.arange(len(lit)) // reading.after % self._batch]
                    with_own, with_others = torch.where(mine, first, second), torch.where(mine, second, first)
                    if bool(with_others.any()):
                        self.left.remove(reading)
                        self.foreign |= reading == self._ordinary and bool((with_others & ~with_own).any())

    def _differences(self, one: Tensor, other: Tensor) -> Tensor:
        different = (one != other) & ~(one.isnan() & other.isnan())
        return different & ~((one - other).abs() <= self._rounding * one.abs().max()) if self._rounding else different

    def decided(self, all_inputs: bool, last: bool) -> Reading | None:
        """The reading that is left, if rows of every place that a sample has were seen to follow it.

        Where all inputs were replaced, of more than half of the places, or of those that are not alike in all samples:
        a start token is, and so is padding.
        """
        if last and self._usual in self.left:
            return self._usual
        if len(self.left) != 1:
            return None
        reading = self.left[0]
        lit = self._lit[reading.axis].view(reading.before, self._batch, reading.after).any(1)
        if lit.all() or (all_inputs and lit.float().mean() > 0.5):
            return reading
        return reading if all_inputs and lit.any() and bool((lit | self._alike(reading)).all()) else None

    def _alike(self, reading: Reading) -> Tensor:
        """Whether the rows of a place are the same in all samples, [before, after]; others may be no sample's."""
        alike = torch.ones(reading.before, reading.after, dtype=torch.bool)
        for mark in self._before:
            places = reading.before, reading.after
            rows = reading.split(mark).reshape(self._batch, *mark.shape[: reading.axis], *places, -1)
            same = (rows - rows[:1]).abs() <= 1e-4 * mark.abs().max()
            alike &= same.movedim((-3, -2), (0, 1)).flatten(2).all(2).cpu()
        return alike


def _by_inputs(
    model: nn.Module,
    run: Run,
    args: tuple,
    kwargs: dict,
    candidates: Mapping[Key, Sequence[Reading]],
    batch: int,
    sure: Mapping[Key, Reading | None],
    rounding: Mapping[Key, float],
    axis: int,
) -> tuple[dict[Key, Reading | None], set[Key]]:
    """One input after the other is changed, then all together; returns what was found, and which outputs changed."""
    leaves, tree = tree_flatten((args, kwargs))
    places = [each for each in leaves if isinstance(each, Tensor) and _axis(each, batch, axis) is not None]
    places = list({id(each): each for each in places}.values())
    # Samples may be on other axes of other tensors, or in what is no tensor.
    rest = [each for each in leaves if all(each is not place for place in places)]
    plain = (type(None), bool, int, float, str)
    known = all(batch not in _sizes(each) if isinstance(each, Tensor) else isinstance(each, plain) for each in rest)

    def rehearse(changed: list[Any]) -> dict[Key, list[Tensor]]:
        with dry_run(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the pass has given them
            marks: dict[Key, list[Tensor]] = {}
            for layer, outputs in run(*tree_unflatten(changed, tree)).items():
                for shape, each in outputs:
                    marks.setdefault((layer, shape), []).append(each)
            return marks

    found: dict[Key, Reading | None] = {}
    touched: set[Key] = set()
    try:
        before = rehearse(leaves)
    except Exception:  # a model that cannot be run again
        return found, touched
    choices = [*([each] for each in places), *([places] if len(places) > 1 else [])]
    for number, chosen in enumerate(choices):
        evidence = {
            key: _Evidence(each, key[1], batch, key not in sure, sure.get(key), rounding.get(key, 0.0))
            for key, each in candidates.items()
            if key in before and key not in found and (len(chosen) > 1 or key not in touched)
        }
        try:
            for bit, half in enumerate(_halves(batch) if evidence else ()):
                if bit and not any(each.open for each in evidence.values()):
                    break
                both = [rehearse(_replaced(leaves, chosen, each, axis)) for each in (half, ~half)]
                for key, each in evidence.items():
                    each.add(before[key], [marks.get(key) for marks in both], half)
        except Exception:  # lengths that must fall, say: what the model refuses tells nothing
            continue
        touched |= {key for key, each in evidence.items() if each.touched}
        every = known and len(chosen) == len(places)
        decided = {key: each.decided(every, len(chosen) == len(places)) for key, each in evidence.items()}
        found |= {key: reading for key, reading in decided.items() if reading is not None}
        if number == 0:  # the tensor that says how many samples there are
            found |= {key: None for key, each in evidence.items() if each.foreign and key not in found}
    return found, touched


def _axis(tensor: Tensor, batch: int, axis: int) -> int | None:
    """The axis of a tensor that counts samples."""
    sizes = _sizes(tensor)
    return next((each for each in (axis, 0) if sizes[each : each + 1] == (batch,)), None)


def _sizes(tensor: Tensor) -> Shape:
    return () if tensor.is_nested or tensor.layout is not torch.strided else tuple(tensor.shape)


def _halves(batch: int) -> Iterator[Tensor]:
    """Masks [batch] of the samples that have a bit in their number, for each bit."""
    # Numbers without order: samples that lie regularly would agree with more readings.
    numbers = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    for bit in range((batch - 1).bit_length()):
        yield (numbers >> bit) & 1 == 1


def _replaced(leaves: list[Any], chosen: Sequence[Tensor], replaced: Tensor, axis: int) -> list[Any]:
    """The leaves, with those samples of the chosen ones replaced by their neighbours."""
    others: dict[int, Tensor] = {}
    for each in chosen:
        leaf, at = each.detach(), _axis(each, len(replaced), axis) or 0
        where = replaced.to(leaf.device).view(-1, *[1] * (leaf.dim() - at - 1))
        others[id(each)] = torch.where(where, leaf.roll(1, at), leaf)  # a tensor given twice stays one
    return [others.get(id(each), each) for each in leaves]
