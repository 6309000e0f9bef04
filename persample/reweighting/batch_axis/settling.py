"""What is proven of layers is settled, and what would be read wrongly by its size is refuted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from persample.attribution.owner import NOBODY, Owner
from persample.reweighting.autograd import Uses
from persample.reweighting.batch_axis import dry_run
from persample.reweighting.batch_axis.folded import Reading
from persample.reweighting.batch_axis.output_graph import OutputGraph, Way
from persample.reweighting.layer import Layer


def settle(way: Way, batch: int, tried: Mapping[dry_run.Key, Reading | None]) -> set[dry_run.Key]:
    """Settles the outputs of which it is proven what they hold, and returns them.

    Arguments:
        way: how to read the model's output, and what that proves.
        batch: number of samples B.
        tried: what a trial has told. Where it is something else, the rows lie in another order than in the output.
    """
    settled: set[dry_run.Key] = set()
    for layer, calls in way.proven.items():
        readings: dict[dry_run.Shape, set[Reading | None]] = {shape: set() for shape in calls.shapes.values()}
        for number, shape in calls.shapes.items():
            each = calls.proven.get(number)
            readings[shape].add(None if each is None else each.reading)
        parts = any(each.count != batch for each in calls.proven.values())
        if parts or any(len(each - {None}) > 1 for each in readings.values()):
            layer.settle_segments(batch, calls.number, calls.proven)
            settled |= {(layer, shape) for shape in readings}
            continue
        for shape, found in readings.items():
            reading = next(iter(found))
            if len(found) == 1 and reading is not None and tried.get((layer, shape), reading) == reading:
                layer.settle(shape, batch, reading)
                settled.add((layer, shape))
    return settled


def refuse_parts(ways: Iterable[Way], batch: int, known: Set[dry_run.Key]) -> None:
    """Settles that layers are not to be read by their size which would be called on parts of the batch in one way."""
    for way in ways:
        for layer, calls in way.proven.items():
            if any(each.count != batch for each in calls.proven.values()):
                for shape in set(calls.shapes.values()):
                    if (layer, shape) not in known:
                        layer.settle(shape, batch, None)


def refute(behind: OutputGraph, way: Way, uses: Mapping[Layer, Uses], batch: int, known: Set[dry_run.Key]) -> None:
    """Settles that layers of which nothing is proven are not to be read by their size, where their rows are others'."""
    left = [
        (layer, shape, uses[layer].taps[number]())
        for layer, calls in way.proven.items()
        for number, shape in calls.shapes.items()
        if number not in calls.proven and (layer, shape) not in known and layer.by_size(shape, batch) is not None
    ]
    owners = behind.ask([tap for _, _, tap in left], way.choice) if left else []
    for (layer, shape, _), owner in zip(left, owners, strict=True):
        reading = layer.by_size(shape, batch)
        if owner is not None and reading is not None and not _agrees(owner, reading):
            layer.settle(shape, batch, None)


def _agrees(owner: Owner, reading: Reading) -> bool:
    """Whether each row has a sample of its own."""
    if owner.axis != reading.axis:
        return False
    ids = owner.ids[owner.ids != NOBODY]
    return len(ids.unique()) == len(ids)
