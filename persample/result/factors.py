"""The factors that a result holds: as they were captured, or it is noticed; and on their own, to be copied or saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from persample.blocks.reductions import materialise
from persample.blocks.types import Block, Dense, Pulled, with_factors
from persample.capture.assemble import saved_on_the_way
from persample.capture.types import Captured
from persample.result.gradient import Gradient
from persample.result.unchanged import Unchanged, lies_in

Uses = Mapping[str, tuple[Captured, ...]]


def owned(uses: Uses, caller: frozenset[int], *, devices: Sequence[str] = ("cpu",)) -> Uses:
    """Returns the uses with copies of factors in the caller's memory, but for those on some devices.

    On others, asking whether they have changed would wait for the device.
    """
    copy = _copying(lambda factor: factor.device.type not in devices and lies_in(factor, caller))
    return {name: tuple(_changed(use, copy) for use in found) for name, found in uses.items()} if caller else uses


def watched(gradients: Iterable[Gradient], caller: frozenset[int]) -> Unchanged:
    """Remembers what the gradients are formed from, now."""
    return Unchanged.of(held(gradients), caller)


def held(gradients: Iterable[Gradient]) -> list[Tensor]:
    """The tensors that the gradients are formed from."""
    blocks = [block for gradient in gradients for block in gradient.blocks]
    return [each for block in blocks for each in (*block.factors, *saved_on_the_way(block))]


def portable(gradients: Mapping[str, Gradient]) -> dict[str, Gradient]:
    """Returns the same gradients, of tensors that are nobody else's and not larger than they seem.

    Parameters become one zero that stands for all of their entries, and rows take the place of what only a graph can
    form.
    """
    copy = _copying(lambda factor: True)

    def alone(use: Captured) -> Captured:
        return _changed(replace(use, block=_without_graph(use.block)), copy)

    return {
        name: Gradient(stand_in(each.parameter), tuple(map(alone, each.uses)), each.losses)
        for name, each in gradients.items()
    }


def stand_in(parameter: Tensor) -> Tensor:
    """Zeros of a parameter's shape, precision and device, in the memory of one."""
    return parameter.detach().new_zeros(()).expand(parameter.shape)


def _without_graph(block: Block) -> Block:
    with torch.no_grad():
        return Dense(materialise(block)) if isinstance(block, Pulled) else block


def _changed(use: Captured, change: Callable[[Tensor], Tensor]) -> Captured:
    return replace(use, block=with_factors(use.block, change))


def _copying(wanted: Callable[[Tensor], bool]) -> Callable[[Tensor], Tensor]:
    """Copies what is wanted, and what several uses share once."""
    copies: dict[tuple, Tensor] = {}

    def copy(factor: Tensor) -> Tensor:
        if not wanted(factor):
            return factor
        place = factor.data_ptr(), factor.shape, factor.stride(), factor.dtype
        if place not in copies:
            copies[place] = factor.detach().clone()
        return copies[place]

    return copy
