"""Tensors that autograd saved for the backward pass: what a graph, or a piece of one, still reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from persample.graph import Node

_RAW_SAVED: dict[str, tuple[str, ...]] = {}


def _names(node: Node) -> tuple[str, ...]:
    kind = node.name()
    if kind not in _RAW_SAVED:
        _RAW_SAVED[kind] = tuple(name for name in dir(node) if name.startswith("_raw_saved"))
    return _RAW_SAVED[kind]


def unpacked_by_hooks(nodes: Sequence[Node]) -> bool:
    """Whether tensors saved for the nodes come from hooks (checkpointing, offloading) and may be read only once."""
    for node in nodes:
        for name in _names(node):
            raw = getattr(node, name)
            for saved in raw if isinstance(raw, (tuple, list)) else (raw,):
                # a torch that does not tell is not trusted
                if saved is not None and getattr(saved, "unpack_hook", saved) is not None:
                    return True
    return False


def saved_by(nodes: Iterable[Node]) -> list[Tensor]:
    """The tensors saved for the nodes, as far as they are still there and may be read more than once."""
    found: list[Tensor] = []
    for node in nodes:
        if unpacked_by_hooks([node]):
            continue
        for name in _names(node):
            unpacked = name.removeprefix("_raw")  # of a Function in Python without the underscore
            try:
                value = getattr(node, unpacked if hasattr(type(node), unpacked) else unpacked[1:])
            except RuntimeError:
                continue  # freed by a backward pass, or changed in place, of which autograd tells
            several = value if isinstance(value, (tuple, list)) else (value,)
            found += [each for each in several if isinstance(each, Tensor)]
    return found
