"""Tensors that autograd saved for the backward pass: what a graph, or a piece of one, still reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from persample.graph.nodes import Node

_RAW_SAVED: dict[str, tuple[str, ...]] = {}


_FREE = "persample.graph.saved"


class Reader:
    """Unpacks saved tensors for this library: they may be read as often as one likes, unless they were changed."""

    def read(self, kept: tuple[Tensor, int | None]) -> Tensor:
        """What the node gets for a saved tensor, packed with the version it had."""
        saved, version = kept
        if version is not None and saved._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {tuple(saved.shape)} is at version {saved._version}; expected version {version}"
            )
        return saved

    def hook(self, saved: Any) -> bool:
        """Unpacks a packed tensor from now on; returns False where hooks of others do, for it takes one pair."""

        def pack(tensor: Tensor) -> tuple[Tensor, int | None]:
            return tensor.detach(), None if tensor.is_inference() else tensor._version

        try:
            saved.register_hooks(pack, self.read)
        except RuntimeError as error:
            return "with value None" in str(error)  # nothing is saved there
        return True


def raw_saved(node: Node) -> Iterator[Any]:
    """The tensors saved for a node, packed as they are; None among them."""
    for name in _names(node):
        raw = getattr(node, name)
        yield from raw if isinstance(raw, (tuple, list)) else (raw,)


def unpacked_by_hooks(nodes: Iterable[Node], *, untold: bool = True) -> bool:
    """Whether tensors saved for the nodes come from hooks (checkpointing, offloading) and may be read only once.

    Args:
        nodes: of the graph.
        untold: the answer for a saved tensor of a torch that does not tell, as up to 2.9.
    """
    return any(saved is not None and _hooked(saved, untold) for node in nodes for saved in raw_saved(node))


def _hooked(saved: Any, untold: bool) -> bool:
    """Whether a saved tensor, packed, comes from hooks of others."""
    if not hasattr(saved, "unpack_hook"):
        return untold
    return saved.unpack_hook is not None and not isinstance(getattr(saved.unpack_hook, "__self__", None), Reader)


def may_be_read(node: Node) -> bool:
    """Whether what is saved for one node may be read more than once, hooks of others being on none of it.

    A torch that does not tell, up to 2.9, is asked by giving it a `Reader`'s hooks, which stay.
    """
    found = [saved for saved in raw_saved(node) if saved is not None]
    if all(hasattr(saved, "unpack_hook") for saved in found):
        return not unpacked_by_hooks([node])
    if _FREE not in node.metadata:
        node.metadata[_FREE] = all(Reader().hook(saved) for saved in found)
    return node.metadata[_FREE]


def _names(node: Node) -> tuple[str, ...]:
    kind = node.name()
    if kind not in _RAW_SAVED:
        _RAW_SAVED[kind] = tuple(name for name in dir(node) if name.startswith("_raw_saved"))
    return _RAW_SAVED[kind]


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
            found += [each for each in several if isinstance(each, Tensor) and not _memory_gone(each)]
    return found


def _memory_gone(tensor: Tensor) -> bool:
    """Whether its memory was given back behind autograd, as FSDP does with gathered parameters; never to be read."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return False
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0
