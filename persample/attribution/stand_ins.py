"""Finite numbers that stand in for those that are not, so that a backward pass tells whose rows are whose.

A NaN times any weight is NaN, so the gradient of a weighted loss says nothing of an entry that is not finite: whether
one sample stands behind it, or many. Which samples do is a matter of the operations and of their indices. So the same
pass runs with other numbers in what the operations have saved:

    saved NaN, infinity ─▶ numbers of (1/4, 3/4)      what a pass reads is replaced as it is read, nothing is written
    a node still makes finite gradients infinite ─▶ its saved numbers are ±1, at last its zeros, too (√0, log 0, x / 0)

Everything finite is as it was, and with it every zero that keeps samples apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from persample.graph.nodes import Node
from persample.graph.saved import reader_of

ROUNDS = 8
"""Passes that look for operations which make finite gradients infinite, at most."""
LARGEST = 2.0**10
"""Saved numbers of such an operation that are larger, or smaller than the inverse, are replaced."""
NUMBERS, ZEROS = 4, 5
"""Levels at which other numbers stand in for all that is not zero, and for zeros as well."""
LEVELS = NUMBERS, ZEROS
"""In this order: zeros may keep samples apart, so they are left as long as they can be."""
_KEY = "persample.attribution.stand_ins"


@dataclass
class Switch:
    """Of one node: whether numbers stand in for what it has saved."""

    level: int = 0
    """0: none; 1: for NaN and infinity; 2: for what is very large or small as well; 3: for zeros as well.
    `NUMBERS`, `ZEROS`: for everything."""
    seed: int = 0

    def stand_in(self, saved: Tensor) -> Tensor:
        """What the node gets for a saved tensor."""
        if not self.level or not (saved.is_floating_point() or saved.is_complex()) or saved.layout != torch.strided:
            return saved
        if self.level == 1:
            return torch.where(saved.isfinite(), saved, _drawn(saved, self.seed))
        if self.level == NUMBERS:
            return torch.where(saved == 0, saved, _drawn(saved, self.seed))
        if self.level == ZEROS:
            return _drawn(saved, self.seed)
        size = saved.abs()
        usual = saved.isfinite() & (size <= LARGEST) & (size >= 1 / LARGEST)
        if self.level == 2:
            usual |= saved == 0
        return torch.where(usual, saved, torch.where(saved.isfinite() & (saved != 0), saved.sgn(), 1))


@contextmanager
def stand_ins(
    nodes: Collection[Node], run: Callable[[], object] | None = None, seed: int = 0, level: int = 1
) -> Iterator[None]:
    """Until it is left, the nodes read finite numbers where they have saved others.

    Args:
        nodes: autograd nodes, whose saved tensors get hooks that stay; those that have some already are left alone.
        run: does a backward pass; nodes that make finite gradients infinite in it get more numbers replaced.
        seed: of the numbers.
        level: of all nodes to begin with, see `Switch`.
    """
    switches = {node: _switch(node) for node in nodes}
    try:
        for switch in switches.values():
            switch.level, switch.seed = level, seed
        for _ in range(ROUNDS if run is not None and level == 1 else 0):
            poles = _poles(nodes, run)
            raised = [switches[node] for node in poles if switches[node].level < 3]
            for switch in raised:
                switch.level += 1
            if not raised:
                break
        yield
    finally:
        for switch in switches.values():
            switch.level = 0


def _switch(node: Node) -> Switch:
    switch = node.metadata.get(_KEY)
    if switch is None:
        switch = node.metadata[_KEY] = Switch()
        reader_of(node).change = switch.stand_in
    return switch


def _drawn(like: Tensor, seed: int) -> Tensor:
    """Numbers in no simple relation; by no generator, which `torch.vmap` would refuse."""
    number = torch.arange(like.numel(), dtype=torch.float64, device=like.device) + 1
    noise = (torch.sin(12.9898 * number + 78.233 * seed) * 43758.5453) % 1
    return (0.25 + 0.5 * noise).view(like.shape).to(like.dtype)


def _poles(nodes: Collection[Node], run: Callable[[], object] | None) -> list[Node]:
    """The nodes that get finite gradients in a pass and give others."""
    found: list[Node] = []

    def look(node: Node, given: tuple[Tensor | None, ...], got: tuple[Tensor | None, ...]) -> None:
        if _finite(got) and not _finite(given):
            found.append(node)

    handles = [node.register_hook(partial(look, node)) for node in nodes if not hasattr(node, "variable")]
    try:
        if run is not None:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _finite(gradients: tuple[Tensor | None, ...]) -> bool:
    return all(each is None or bool(each.isfinite().all()) for each in gradients)
