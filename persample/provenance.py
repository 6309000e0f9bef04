"""Provenance: which autograd nodes saw the batch's data, and in which module.

An operation on parameters alone and one that couples samples look alike in the graph: z at its output sums over
samples. What tells them apart is whether data went in. While the model runs, every operation that reads a
tensor derived from the inputs is noted by the sequence number of its autograd node, with the module it ran in.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from persample.graph import Node


class Provenance(TorchDispatchMode):
    """Follows data through the operations of a forward pass, by storage, views and in-place writes included."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._saw: dict[int, int] = {}
        self._inputs: list[Tensor] = []
        self._module_of: dict[int, str] = {}
        self._modules: list[str] = []
        self._last = _next_number()

    def follow(self, tree: Any) -> None:
        """Declares every tensor of the tree an input."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self._mark(leaf, 1 << len(self._inputs))
                self._inputs.append(leaf)

    def saw_data(self, node: Node, batch: int) -> bool:
        """Whether the node's operation read something derived from an input that holds `batch` samples.

        Those are the inputs with `batch` entries along dimension 0, or where there is none (time-major sequences,
        the nodes of a batch of graphs) all with more than one. The others, such as position ids of shape [1, T] or
        a mask, are shared by all samples and no data.
        """
        sizes = [tensor.shape[0] if tensor.ndim else 1 for tensor in self._inputs]
        samples = [i for i, size in enumerate(sizes) if size == batch] or [
            i for i, size in enumerate(sizes) if size > 1
        ]
        return bool(self._saw.get(_number(node), 0) & sum(1 << i for i in samples))

    def module(self, node: Node) -> str | None:
        """Path of the module in whose forward pass the node's operation ran; None outside of the model."""
        return self._module_of.get(_number(node))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        number = _next_number()
        created, self._last = number != self._last, number
        read = 0
        for leaf in _tensors(args):
            read |= self._marks(leaf)
        for leaf in _tensors(kwargs.values()):
            read |= self._marks(leaf)
        if created:
            # autograd makes the node before it calls the kernel, so the newest number is this operation's
            self._saw[number - 1] = read
            if self._modules:
                self._module_of[number - 1] = self._modules[-1]
        result = func(*args, **kwargs)
        if read:
            written = [args[place] for place in _written(func) if place < len(args)]
            for leaf in (*_tensors((result,)), *_tensors(written)):
                self._mark(leaf, read)
        return result

    def _mark(self, tensor: Tensor, marks: int) -> None:
        storage = _storage(tensor)
        if storage is not None:
            self._storages[storage.cdata] = storage, marks | self._marks(tensor)

    def _marks(self, tensor: Tensor) -> int:
        """The inputs that the tensor's storage derives from, one bit each."""
        try:
            known = self._storages.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):
            return 0  # tensors without storage
        return 0 if known is None or known[0].expired() else known[1]

    @contextmanager
    def named(self, model: nn.Module) -> Iterator[None]:
        """Names the operations of the model by module while it runs in this thread."""
        thread = threading.get_ident()

        def enter(path: str) -> Any:
            def hook(*_: Any) -> None:
                if threading.get_ident() == thread:
                    self._modules.append(path)

            return hook

        def leave(*_: Any) -> None:
            if threading.get_ident() == thread and self._modules:
                self._modules.pop()

        handles = []
        try:
            for path, module in model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # scripted modules take no hooks; their operations go by the name of their owner
                handles.append(module.register_forward_pre_hook(enter(path)))
                handles.append(module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


@cache
def _written(func: Any) -> tuple[int, ...]:
    """Positions of the arguments that an operation writes into."""
    infos = enumerate(argument.alias_info for argument in func._schema.arguments)
    return tuple(place for place, info in infos if info is not None and info.is_write)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, which nest in lists and tuples alone."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None  # tensors without storage: functorch wrappers, sparse tensors


def _next_number() -> int:
    return torch._C._autograd._get_sequence_nr()


def _number(node: Node) -> int:
    return node._sequence_nr()
