"""Which layers are tried out (`persample.reweighting.batch_axis.dry_run`), in which forward passes of `reweight`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from persample.blocks.precision import full_precision
from persample.graph.provenance import tensors_of
from persample.reweighting.autograd import Pass, Uses
from persample.reweighting.batch_axis import dry_run
from persample.reweighting.batch_axis.folded import Reading, usual
from persample.reweighting.batch_axis.holding import count_by_output, hold
from persample.reweighting.batch_axis.output_graph import OutputGraph, Way
from persample.reweighting.batch_axis.settling import refuse_parts, refute, settle
from persample.reweighting.batch_axis.time_first import Ends, Question, by_model, by_output
from persample.reweighting.batch_axis.uncertain import told_by_losses
from persample.reweighting.layer import Layer

_REMEMBERED = 1000
_OUTPUT = "output"
"""Stands for a layer: the model's output."""


class LayoutProbe:
    """Collects in a forward pass the outputs of which sizes do not tell where the samples are, and has them tried.

    Arguments:
        model: the model.
        watching: the context in which functions are seen, too.
    """

    def __init__(self, model: nn.Module, watching: Callable[[], AbstractContextManager[None]]) -> None:
        self._model, self._watching = model, watching
        self._unsure: dict[dry_run.Key, list[Reading]] = {}
        self._outputs: set[Reading] = set()  # how trials have told to read what the model returns
        self._own: dict[dry_run.Shape, bool] = {}  # whether rows of such outputs were the samples'
        self._calls: Counter[dry_run.Key] = Counter()
        self._signature: Any = None  # of the running pass
        self._met: set[Any] = set()  # shapes of tensors, and small values, that the model has been called with
        self.axis: int | None = None
        """The axis of the first tensor that counts samples, where it is known: 1 in models that take time first."""
        self._output_axis: int | None = None
        """The axis of the output that counts samples, in these."""
        self.new = False
        """Whether those of the running pass are new: rows that were samples may be folded now."""
        self.running: dict[Any, list[tuple[dry_run.Shape, Tensor]]] | None = None
        """While the model is tried out: shapes and marks of the outputs of each layer."""

    def begin(self, args: tuple, kwargs: dict) -> None:
        """A forward pass for training begins."""
        given: list[Any] = [*args, *kwargs.values()]
        if any(isinstance(each, (dict, list, tuple)) for each in given):
            given = tree_leaves(given)
        signature = tuple(
            each.shape if isinstance(each, Tensor) else each if isinstance(each, (int, str)) else None for each in given
        )
        self.new = signature not in self._met
        self._signature = signature

    def forget(self) -> None:
        """Nothing is to be tried."""
        self._unsure, self.new = {}, False
        self._calls.clear()

    def look(self, layer: Layer, shape: dry_run.Shape, batch: int | None) -> None:
        """The pass has met an output of that shape."""
        if batch == 1:  # all rows are the sample's
            layer.forget_axis(shape)
        self._calls[layer, shape] += 1
        candidates = layer.unsure(shape, batch)
        if candidates:
            self._unsure[layer, shape] = candidates

    def end(
        self,
        args: tuple,
        kwargs: dict,
        output: Any,
        uses: Mapping[Layer, Uses],
        forward: Pass,
        shape: dry_run.Shape,
        *,
        first: bool,
    ) -> None:
        """The pass ends: reads the graph behind the output if the shapes are new, and tries the model out if need be.

        Arguments:
            args, kwargs: of the model.
            output: of the model.
            uses: of the layers that the pass has met.
            forward: the pass.
            shape: of the first tensor that the model was given.
            first: whether it was the first pass.
        """
        readable = {layer: each for layer, each in uses.items() if layer.provable}
        axis = self._output_axis
        if self.new:  # a pass that raised will be new again
            if len(self._met) == _REMEMBERED:  # a number that counts steps, say
                self._met.clear()
            self._met.add(self._signature)
            if readable and self.axis is None and len(shape) > 1 and forward.batch == shape[0]:
                axis = self._look_at_time(output, readable, forward, shape)
        untold = {layer: each for layer, each in uses.items() if layer.untold}
        look = self.new or any(layer.routed for layer in untold)
        if look and len(shape) < 3 and len(untold) == len(uses) and count_by_output(output, untold, forward):
            self._unsure = {}
        batch = forward.batch
        if batch is not None and batch > 1:
            behind = OutputGraph.behind(output, batch, axis) if look else None
            ways = behind.ways(readable) if behind is not None and self.new else {}
            settled = settle(next(iter(ways.values())), batch, {}) if len(ways) == 1 else set()
            self._hold(behind, untold, settled, args, kwargs, first=first)
            self._read(behind if self.new else None, ways, settled, readable, args, kwargs, batch, first)
        self.forget()

    def _hold(
        self,
        behind: OutputGraph | None,
        uses: Mapping[Layer, Uses],
        settled: set[dry_run.Key],
        args: tuple,
        kwargs: dict,
        *,
        first: bool,
    ) -> None:
        """Notes what calls of layers hold of this batch whose rows data place, as far as the indices tell."""
        unsure = {key[0] for key in self._unsure.keys() - settled}
        left = {layer for layer in uses if layer.routed or not layer.provable or layer in unsure}
        if behind is None or behind.doubtful is not None or not left:
            return
        placed = [layer for layer in left if layer.selected or layer.placed]
        if placed and not self._holds_samples(behind, max(map(_rounding, placed)), args, kwargs, first=first):
            return
        done = hold(behind, uses, left)
        self._unsure = {key: each for key, each in self._unsure.items() if key[0] not in done}

    def _holds_samples(self, behind: OutputGraph, rounding: float, args: tuple, kwargs: dict, *, first: bool) -> bool:
        """Whether the output's rows are those of the samples, and not as many that were selected: tried out once."""
        new = {key: each for key, each in behind.by_size().items() if key not in self._own}
        if not new:
            return all(self._own[key] for key in behind.by_size())
        if _together(self._model) and not first:
            return False
        keys: dict[dry_run.Key, list[Reading]] = {(_OUTPUT, shape): [each] for shape, each in new.items()}
        before = self._unsure
        found = self._tried({}, keys, set(), args, kwargs, behind.batch, dict.fromkeys(keys, rounding))
        self._unsure = before
        self._own |= {shape: found.get((_OUTPUT, shape)) == each for shape, each in new.items()}
        return all(self._own[shape] for shape in behind.by_size())

    def _read(
        self,
        behind: OutputGraph | None,
        ways: dict[Reading | None, Way],
        settled: set[dry_run.Key],
        uses: Mapping[Layer, Uses],
        args: tuple,
        kwargs: dict,
        batch: int,
        first: bool,
    ) -> None:
        """Settles what a trial tells, of what the graph behind the output does not prove."""
        # Of layers behind which there is no graph nothing is known: called on parts of the batch, or not.
        blind = {key for key, each in self._unsure.items() if behind is None and (each[0].axis or self._calls[key] > 1)}
        unsure = {key: each for key, each in self._unsure.items() if key not in settled}
        unsure = {key: each for key, each in unsure.items() if key in blind or self._leaves_room(key, batch)}
        doubtful: dict[dry_run.Key, list[Reading]] = {}
        if behind is not None and behind.doubtful is not None and len(ways) > 1:
            doubtful[_OUTPUT, behind.doubtful[0]] = behind.doubtful[1]
        if (unsure or doubtful) and _together(self._model):
            # Every process must run the model as often as the others: only what depends on no batch is tried.
            tried = {key: each for key, each in unsure.items() if first and not _one_axis(each)}
            for layer, _ in unsure.keys() - tried.keys():
                layer.note = (
                    "it was not tried out with other samples, because processes share a forward pass (FSDP, DDP, "
                    "SyncBatchNorm), and only their first one is sure to be alike in all"
                )
            unsure, doubtful = tried, doubtful if first else {}
        found = self._tried(unsure, doubtful, blind, args, kwargs, batch)
        told = [reading for key in doubtful if (reading := found.get(key)) in ways and reading is not None]
        if told:
            ways = {told[0]: ways[told[0]]}
            self._outputs.add(told[0])
            settled |= settle(ways[told[0]], batch, found)
        for layer, shape in unsure:
            layer.note = "a trial with other samples did not tell how to read its rows"
            if (layer, shape) in found and (layer, shape) not in settled:
                layer.settle(shape, batch, found[layer, shape])
        known = settled | found.keys()
        if len(ways) > 1:
            refuse_parts(ways.values(), batch, known)
        elif behind is not None and ways and not _together(self._model):
            refute(behind, next(iter(ways.values())), uses, batch, known)

    def _leaves_room(self, key: dry_run.Key, batch: int) -> bool:
        """Whether the size of an output leaves more than one reading.

        As many rows as samples need not be these where rows were selected, nor where a layer is called as often: for
        one sample at a time, with as many positions.
        """
        candidates = self._unsure[key]
        several = len(candidates) > 1 or not candidates[0].ordinary
        return several or key[0].selected or self._calls[key] % batch == 0

    def _tried(
        self,
        unsure: Mapping[dry_run.Key, list[Reading]],
        doubtful: Mapping[dry_run.Key, list[Reading]],
        blind: Set[dry_run.Key],
        args: tuple,
        kwargs: dict,
        batch: int,
        company: Mapping[dry_run.Key, float] | None = None,
    ) -> dict[dry_run.Key, Reading | None]:
        """What a trial tells of the outputs of layers, and of the model's."""
        self._unsure = {**unsure, **doubtful}
        if not self._unsure:
            return {}
        confirmed = {key: usual(set(key[0].readings.values()), each) for key, each in unsure.items() if key[0].readings}
        confirmed |= {key: usual(self._outputs, each) for key, each in doubtful.items() if self._outputs}
        selected = {key: _rounding(key[0]) for key in unsure if key[0].selected or key in blind} | dict(company or {})
        return dry_run.readings(
            self._model, self.rehearse, args, kwargs, self._unsure, batch, confirmed, selected, self.axis or 0
        )

    def _look_at_time(self, output: Any, uses: Mapping[Layer, Uses], forward: Pass, shape: dry_run.Shape) -> int | None:
        """Finds out whether the model takes time first, by what it mixes, or else by the losses that follow.

        Returns the axis of the output that counts samples, where that is sure.
        """
        steps, samples, *_ = shape
        if min(steps, samples) < 2:
            return None
        ends = Ends.of(output, (steps, samples))
        answer = None if ends is None else by_model(ends)
        axis = by_output(output, steps, samples, uses) if ends is None else None
        if ends is not None and answer is not None:
            axis = ends.axes[answer]
        if steps == samples and ends is not None and axis is not None:
            # Which axis of the input these are is left open: the model may have put the other one in front.
            self._ask_later(output, uses, forward, shape, [axis])
            return axis
        if answer is False:
            self.axis = 0
            return None
        if axis is None:
            self._ask_later(output, uses, forward, shape, [0, 1])
            return None
        self._time_first(uses, forward, samples, axis)
        self._unsure = {(layer, at): layer.unsure(at, samples) for layer, at in self._calls}
        self._unsure = {key: each for key, each in self._unsure.items() if each}
        return axis

    def _time_first(self, layers: Iterable[Layer], forward: Pass, samples: int, axis: int) -> None:
        self.axis, self._output_axis, forward.batch = 1, axis, samples
        for layer in layers:
            layer.forget()

    def _ask_later(
        self, output: Any, uses: Mapping[Layer, Uses], forward: Pass, shape: dry_run.Shape, axes: Sequence[int]
    ) -> None:
        """In the first backward pass."""
        question = Question(output, shape[1], uses, axes)
        forward.question = partial(self._ask_losses, forward, question, shape)

    def _ask_losses(self, forward: Pass, question: Question, shape: dry_run.Shape) -> None:
        forward.question = None
        answer = question.answer(forward.batch) if self.axis is None else None
        if answer is None:
            if shape[0] != shape[1]:  # else another batch may tell
                self.axis = self.axis or 0
            return
        axis, proven = answer
        samples = shape[1]
        if axis == 0:
            self._time_first(proven, forward, samples, axis)
            settle(Way(None, proven), samples, {})
            self._met.clear()  # what is not proven is tried in the next pass
        else:
            self.axis = 0
        warnings.warn(told_by_losses(shape, axis), stacklevel=2)

    def rehearse(self, args: tuple, kwargs: dict) -> dict[Any, list[tuple[dry_run.Shape, Tensor]]]:
        """Runs the model; shapes and marks of outputs by layer."""
        self.running = {}
        try:
            with self._watching():
                output = self._model(*args, **kwargs)
            for each in tensors_of(output):
                if (_OUTPUT, tuple(each.shape)) in self._unsure:
                    self.running.setdefault(_OUTPUT, []).append((tuple(each.shape), full_precision(each)))
            return self.running
        finally:
            self.running = None

    def note(self, layer: Layer, output: Tensor | None) -> None:
        """While the model is tried out: a layer has run."""
        assert self.running is not None, "it is"
        noted = self.running.setdefault(layer, [])
        if output is not None and (layer, tuple(output.shape)) in self._unsure:
            noted.append((tuple(output.shape), dry_run.mark(output, layer.linear)))


def _rounding(layer: Layer) -> float:
    """What relative differences of the layer's outputs rounding may explain."""
    weight = layer.members()[0]
    dtype = weight.dtype
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
    return min(64 * torch.finfo(dtype).eps, 0.05)


def _one_axis(candidates: list[Reading]) -> bool:
    return sum(each.ordinary for each in candidates) == 1


def _together(model: nn.Module) -> bool:
    """Whether a forward pass waits for other processes: a trial must run in all of them, or in none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # takes a while, and only here it is needed

    kinds = nn.SyncBatchNorm, nn.parallel.DistributedDataParallel, FSDPModule, FullyShardedDataParallel
    sharded = any(hasattr(each, "to_local") for each in model.parameters())
    return sharded or any(isinstance(each, kinds) for each in model.modules())
