"""Tensors that autograd saved for the backward pass: what a graph, or a piece of one, still reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from torch import Tensor

from persample.graph import Node
from persample.stand_ins import hooked_by_others, raw_saved


def unpacked_by_hooks(nodes: Sequence[Node]) -> bool:
    """Whether tensors saved for the nodes come from hooks (checkpointing, offloading) and may be read only once."""
    return any(saved is not None and hooked_by_others(saved) for node in nodes for saved in raw_saved(node))


def saved_by(nodes: Iterable[Node]) -> list[Tensor]:
    """The tensors saved for the nodes, as far as they are still there and may be read more than once."""
    found: list[Tensor] = []
    for node in nodes:
        if unpacked_by_hooks([node]):
            continue
        for name in _names(type(node)):
            try:
                value = getattr(node, name)
            except RuntimeError:
                continue  # freed by a backward pass, or changed in place, of which autograd tells
            several = value if isinstance(value, (tuple, list)) else (value,)
            found += [each for each in several if isinstance(each, Tensor)]
    return found


@lru_cache(1024)
def _names(kind: type) -> tuple[str, ...]:
    """Attributes that hold tensors; of a Function in Python it is `saved_tensors`."""
    raw = [name.removeprefix("_raw") for name in dir(kind) if name.startswith("_raw_saved")]
    return tuple(name if hasattr(kind, name) else name[1:] for name in raw)
