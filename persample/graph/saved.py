"""Tensors that autograd saved for the backward pass: what a graph, or a piece of one, still reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from persample.graph.nodes import Node

_RAW_SAVED: dict[str, tuple[str, ...]] = {}


_KEY = "persample.graph.saved"


class Reader:
    """Unpacks what one node has saved: as often as one likes, unless it was changed since, or through `change`."""

    def __init__(self) -> None:
        self.change: Callable[[Tensor], Tensor] | None = None
        """What the node gets in place of a saved tensor."""
        self.alone = True
        """Whether nothing is unpacked by hooks of others, of which there can be one pair only."""

    def unpack(self, kept: tuple[Tensor, int | None]) -> Tensor:
        """What the node gets for a saved tensor, packed with the version it had."""
        saved, version = kept
        if version is not None and saved._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {tuple(saved.shape)} is at version {saved._version}; expected version {version}"
            )
        return saved if self.change is None else self.change(saved)


def _pack(tensor: Tensor) -> tuple[Tensor, int | None]:
    return tensor.detach(), None if tensor.is_inference() else tensor._version


def reader_of(node: Node) -> Reader:
    """Returns what unpacks the tensors saved for a node, hooks of others apart, from now on."""
    reader = node.metadata.get(_KEY)
    if reader is None:
        reader = node.metadata[_KEY] = Reader()
        for saved in raw_saved(node):
            if saved is not None:
                try:
                    saved.register_hooks(_pack, reader.unpack)
                except RuntimeError as error:  # hooks of others, or nothing saved there
                    reader.alone &= "with value None" in str(error)
    return reader


def raw_saved(node: Node) -> Iterator[Any]:
    """The tensors saved for a node, packed as they are; None among them."""
    for name in _names(node):
        raw = getattr(node, name)
        yield from raw if isinstance(raw, (tuple, list)) else (raw,)


def unpacked_by_hooks(nodes: Iterable[Node]) -> bool:
    """Whether tensors saved for the nodes come from hooks (checkpointing, offloading) and may be read only once."""
    return any(_hooked(node) for node in nodes)


def _hooked(node: Node) -> bool:
    """Whether what a node has saved comes from hooks of others; torch up to 2.9 tells by refusing ours, which stay."""
    for saved in raw_saved(node):
        if saved is not None:
            if not hasattr(saved, "unpack_hook"):
                return not reader_of(node).alone
            if _by_others(saved.unpack_hook):
                return True
    return False


def hooked_by_others(node: Node) -> list[Any]:
    """What is saved for a node, packed, that hooks of others unpack; none where torch does not tell, up to 2.9."""
    return [saved for saved in raw_saved(node) if _by_others(getattr(saved, "unpack_hook", None))]


def _by_others(hook: Any) -> bool:
    return hook is not None and not isinstance(getattr(hook, "__self__", None), Reader)


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
