"""Saved tensors that a checkpoint computes again, read beside a backward pass that needs them itself.

A checkpoint (`torch.utils.checkpoint`, `use_reentrant=False`) runs a segment of the model again in the backward pass,
and gives each of its saved tensors once. In a group of its own (`torch.utils.checkpoint.GraphExecGroup`, torch 2.10 or
later) a reader has them once more: the segment runs twice in the pass, however many of its tensors are read, and
nothing is kept of it when the pass has gone on.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from inspect import getclosurevars
from typing import Any

import torch.utils.checkpoint
from torch.utils.checkpoint import CheckpointError

from persample.errors import UnsupportedError
from persample.graph.nodes import Node
from persample.graph.saved import hooked_by_others, unpacked_by_hooks

_GROUP: type | None = getattr(torch.utils.checkpoint, "GraphExecGroup", None)
_reading = threading.local()


def recomputed(nodes: Iterable[Node]) -> list[Node]:
    """The nodes of which a checkpoint computes saved tensors again; none where other hooks give some, too."""
    found = []
    for node in nodes:
        hooked = hooked_by_others(node)
        if _GROUP is None or not all(_of_checkpoint(raw.unpack_hook) for raw in hooked):
            return []
        if hooked:
            found.append(node)
    return found


def recomputed_in(order: Iterable[Node], nodes: Collection[Node]) -> list[Node]:
    """Those of a graph in `order`, if tensors saved for the nodes come from hooks at all."""
    return recomputed(order) if unpacked_by_hooks(nodes) else []


@contextmanager
def forgetting(nodes: Iterable[Node]) -> Iterator[None]:
    """Passes that leave the graph there keep nothing of what is computed for the nodes.

    A pass that needs no gradient of the weights leaves the inputs unread, and whoever calls a node has its segment run.
    """
    nodes = list(nodes)
    handles = [node.register_hook(partial(_forget, node)) for node in nodes]
    try:
        yield
    except RuntimeError as error:
        if "selective activation checkpoint" not in str(error):
            raise
        raise UnsupportedError(
            "a selective checkpoint (torch.utils.checkpoint with context_fn=) computes its segment again once and no "
            "more, and per-sample gradients take more than one pass. Leave context_fn out"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for hook in {raw.unpack_hook for node in nodes for raw in hooked_by_others(node)}:
            segment = getclosurevars(hook).nonlocals.get("frame")
            computed = getattr(segment, "recomputed", None)  # torch's own: by pass, what was not read
            if isinstance(computed, dict):
                computed.clear()


def _forget(node: Node, *_: Any) -> None:
    """Reads what is computed for the node and was not read, which gives it up."""
    for raw in hooked_by_others(node):
        with suppress(CheckpointError):  # read already
            raw.unpack_hook(raw.data)


def _of_checkpoint(hook: Any) -> bool:
    return getattr(hook, "__module__", "") == torch.utils.checkpoint.__name__


def reading_beside() -> bool:
    """Whether this thread reads beside a pass now: nodes that it calls would read the same tensors again."""
    return getattr(_reading, "now", False)


class Beside:
    """What reads beside one backward pass."""

    def __init__(self) -> None:
        assert _GROUP is not None, "`recomputed` has found nodes"
        self._group = _GROUP()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Saved tensors of nodes are those of this reader, each once."""
        before, _reading.now = reading_beside(), True
        try:
            with self._group:
                yield
        finally:
            _reading.now = before

    def drop(self, node: Node) -> None:
        """Gives up what was computed for the node and not read."""
        with self.reading():
            _forget(node)
