"""Provenance: which autograd nodes saw the batch's data, and in which module.

An operation on parameters alone and one that couples samples look alike in the graph: z at its output sums over
samples. What tells them apart is whether data went in. While the model runs, every operation that reads a
tensor derived from the inputs is noted by the sequence number of its autograd node, with the module it ran in.

Data may also come in unseen: converted from an array inside of the model, computed in another thread, held by the
model or the loss. So three things are told of a node: that it read samples, that it read what is shared or data
(`doubtful`), or neither.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from persample.graph.nodes import Node

FOREIGN, TARGET, FIRST = 1, 2, 4
"""Bits: read what came in unseen, read a target, read the first input (the others follow)."""


class Provenance(TorchDispatchMode):
    """Follows data through the operations of a forward pass, by storage, views and in-place writes included."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._saw: dict[int, int] = {}
        self._elsewhere: dict[int, int] = {}
        self._inputs: list[Tensor] = []
        self._targets = 0
        self._module_of: dict[int, str] = {}
        self._modules: list[str] = []
        # numbers count in each thread anew, and a backward pass on a GPU runs in a thread of its own
        self._thread = threading.get_ident()
        self._last = {self._thread: _next_number()}
        for state in () if model is None else chain(model.parameters(), model.buffers()):
            self._mark(state, 0)
        self.wrote = False
        """Whether an operation has written to a tensor that it had not made: a parameter, a buffer, an input."""
        self._made: set[int] = set()

    def follow(self, tree: Any) -> None:
        """Declares every tensor of the tree an input; the tree may hold mappings, dataclasses and other objects."""
        for leaf in tensors_of(tree):
            self._mark(leaf, FIRST << len(self._inputs))
            self._inputs.append(leaf)

    def follow_targets(self, tree: Any) -> None:
        """Declares every tensor of the tree a target: samples that parameters may meet in the loss alone."""
        for leaf in tensors_of(tree):
            self._mark(leaf, TARGET)

    def saw_data(self, node: Node, batch: int) -> bool:
        """Whether the node's operation read something derived from an input that holds `batch` samples.

        Those are the inputs with `batch` entries along dimension 0; where there is none, sequences with time first
        ([T, batch, D], integers [T, batch]), or else (the nodes of a batch of graphs) all with more than one entry;
        and without any input what else was brought in. The others, such as position ids of shape [1, T] or a mask,
        are shared by all samples, or `doubtful`.
        """
        return bool(self._read(node) & self._samples(batch))

    def met_samples(self, node: Node, batch: int) -> bool:
        """Whether the node's operation read samples, be it of the targets."""
        return bool(self._read(node) & (self._samples(batch) | TARGET))

    def doubtful(self, node: Node) -> bool:
        """Whether the node's operation read something that may be data, or was not seen at all."""
        number = _number(node)
        return bool(self._read(node)) or (number not in self._saw and number not in self._elsewhere)

    def perhaps_shared(self, node: Node, batch: int) -> Tensor | None:
        """An input taken for samples, where the node's operation read that one and others that are samples not."""
        samples, read = self._samples(batch), self._read(node)
        if read & samples in (0, samples):
            return None
        found = next(t for place, t in enumerate(self._inputs) if read & samples & (FIRST << place))
        return None if found.is_nested else found

    def may_be_data(self, tensor: Tensor) -> bool:
        """Whether the tensor may derive from an input: it does, or nobody saw where it came from."""
        known = type(tensor) is Tensor or isinstance(tensor, nn.Parameter)
        return not known or bool(self._marks(tensor))

    def _read(self, node: Node) -> int:
        number = _number(node)
        return self._saw.get(number, self._elsewhere.get(number, 0))

    def _samples(self, batch: int) -> int:
        """The bits of the inputs that hold samples."""
        found = time_first = several = 0
        for place, tensor in enumerate(self._inputs):
            bit, size = FIRST << place, tensor.size(0) if tensor.ndim else 1
            # two rows of integers are the edges of a graph rather than two steps
            sequence = tensor.ndim >= 3 if tensor.is_floating_point() else tensor.ndim == 2 and size > 2
            found |= bit * (size == batch)
            time_first |= bit * (sequence and not tensor.is_nested and size > 1 and tensor.shape[1] == batch)
            several |= bit * (size > 1)
        return found or time_first or several or (0 if self._inputs else FOREIGN)

    def first_size(self) -> int | None:
        """Entries along dimension 0 of the first input that has one."""
        return next((tensor.size(0) for tensor in self._inputs if tensor.ndim), None)

    def module(self, node: Node) -> str | None:
        """Path of the module in whose forward pass the node's operation ran; None outside of the model."""
        return self._module_of.get(_number(node))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        number, thread = _next_number(), threading.get_ident()
        created, self._last[thread] = number != self._last.get(thread), number
        read = 0
        for leaf in _tensors(args):
            read |= self._marks(leaf)
        for leaf in _tensors(kwargs.values()):
            read |= self._marks(leaf)
        if created:
            # autograd makes the node before it calls the kernel, so the newest number is this operation's
            (self._saw if thread == self._thread else self._elsewhere)[number - 1] = read
            if self._modules and thread == self._thread:
                self._module_of[number - 1] = self._modules[-1]
        result = func(*args, **kwargs)
        written = [args[place] for place in _written(func) if place < len(args)]
        self.wrote = self.wrote or any(not self._was_made(leaf) for leaf in _tensors(written))
        for leaf in (*_tensors((result,)), *_tensors(written)):
            self._mark(leaf, read, made=True)
        return result

    def _mark(self, tensor: Tensor, marks: int, *, made: bool = False) -> None:
        storage = _storage(tensor)
        if storage is not None:
            known = self._storages.get(storage.cdata)
            new = known is None or known[0].expired()
            old = 0 if known is None or new else known[1]
            if new and made:
                self._made.add(storage.cdata)
            self._storages[storage.cdata] = storage, marks | old

    def _clear(self, tensor: Tensor, marks: int) -> None:
        storage = _storage(tensor)
        if storage is not None:
            self._storages[storage.cdata] = storage, self._marks(tensor) & ~marks

    def _was_made(self, tensor: Tensor) -> bool:
        """Whether an operation that was seen has made the tensor's memory."""
        storage = _storage(tensor)
        return storage is None or storage.cdata in self._made

    def _marks(self, tensor: Tensor) -> int:
        """What the tensor's storage derives from: one bit for each input, one for what nobody has seen before."""
        try:
            known = self._storages.get(_stored(tensor).untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError, ValueError):
            return 0  # tensors without storage
        return FOREIGN * (tensor.ndim > 0) if known is None or known[0].expired() else known[1]

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


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a tree, inside mappings, dataclasses and objects of a user's class as well; each once."""
    found: dict[int, Tensor] = {}
    seen: dict[int, Any] = {}
    stack = [tree]
    while stack:
        for leaf in reversed(tree_leaves(stack.pop())):
            if isinstance(leaf, Tensor):
                found[id(leaf)] = leaf
            elif id(leaf) not in seen and not isinstance(leaf, (type, nn.Module)):
                seen[id(leaf)] = leaf
                if isinstance(leaf, Mapping):
                    stack.extend(leaf.values())
                elif is_dataclass(leaf):
                    stack.extend(getattr(leaf, each.name) for each in fields(leaf))
                elif hasattr(leaf, "__dict__") and not callable(leaf):
                    stack.extend(vars(leaf).values())
    return list(found.values())


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
        return StorageWeakRef(_stored(tensor).untyped_storage())
    except (NotImplementedError, RuntimeError, ValueError):
        return None  # no storage: functorch wrappers, parameters of lazy modules


def _stored(tensor: Tensor) -> Tensor:
    """The tensor, or of a sparse one the values."""
    if tensor.layout is torch.strided:
        return tensor
    return tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()


def _next_number() -> int:
    return torch._C._autograd._get_sequence_nr()


def _number(node: Node) -> int:
    return node._sequence_nr()
