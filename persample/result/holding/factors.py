"""The factors that a result holds: nobody else's, or a change is noticed; and on their own, to be copied or saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from persample.blocks.reductions import materialise
from persample.blocks.types import Block, Dense, Pulled, with_factors
from persample.capture.assemble import saved_on_the_way
from persample.capture.types import Captured
from persample.result.gradient import Gradient
from persample.result.holding.unchanged import Unchanged, lies_in

Uses = Mapping[str, tuple[Captured, ...]]


def owned(uses: Uses, caller: frozenset[int]) -> Uses:
    """Returns the uses with copies of the factors that lie in the caller's memory: what he writes there is not theirs.

    A copy costs less than telling of a change would, and takes the memory of the input.
    """
    inside = partial(lies_in, memory=caller)
    copy = _copying(inside)

    def own(use: Captured) -> Captured:
        return _changed(use, copy) if any(map(inside, use.block.factors)) else use

    return {name: tuple(map(own, found)) for name, found in uses.items()}


def watched(gradients: Iterable[Gradient], caller: frozenset[int]) -> Unchanged:
    """Remembers what the gradients are formed from, now: factors that are `owned`, and what lies behind them."""
    factors, saved = held(gradients)
    inside: tuple[list[Tensor], list[Tensor]] = [], factors
    for each in saved:
        inside[not lies_in(each, caller)].append(each)
    return Unchanged(*inside)


def held(gradients: Iterable[Gradient]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that the gradients are formed from: factors, and what rows are pulled back with."""
    blocks = [block for gradient in gradients for block in gradient.blocks]
    factors = [factor for block in blocks for factor in block.factors]
    return factors, [each for block in blocks for each in saved_on_the_way(block)]


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
