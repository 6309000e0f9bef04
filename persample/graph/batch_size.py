"""How many samples a model is called with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves


def batch_size(args: tuple, kwargs: dict, *, first: bool = False) -> int | None:
    """Returns the length of axis 0 of the first tensor that has an axis, or the sequences of the first packed batch.

    A first tensor of one row is passed over where samples share it: where its other axes are among those of a later
    tensor with several rows, as of positions [1, T] or a mask [1, 1, T, T] in front of tokens [B, T].
    Also inside mappings (the batches of tokenizers) and dataclasses; None where there is no tensor.

    Arguments:
        first: it counts samples whatever its size, as other batches have shown.

    >>> batch_size((), {"mask": None, "tokens": torch.zeros(4, 7)})
    4
    >>> batch_size((), {"positions": torch.zeros(1, 7), "tokens": torch.zeros(4, 7)})
    4
    >>> batch_size((), {"positions": torch.zeros(1, 7), "tokens": torch.zeros(4, 7)}, first=True)
    1
    """
    if args and isinstance(args[0], Tensor) and args[0].dim() and args[0].size(0) != 1:
        return args[0].size(0)  # of nested tensors there is no shape
    shape = batch_shape(args, kwargs, first=first)
    return None if shape is None else shape[0]


def batch_shape(args: tuple, kwargs: dict, *, first: bool = False) -> tuple[int, ...] | None:
    """Returns the shape of that tensor; of packed sequences, how many there are.

    >>> batch_shape((torch.zeros(4, 7),), {})
    (4, 7)
    """
    shapes = _shapes((args, kwargs))
    front = next(shapes, None)
    if front is not None and front[0] == 1 and not first:
        return next((shape for shape in shapes if shape[0] > 1 and _shared(front, shape)), front)
    return front


def _shared(front: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a tensor of one row may go with all rows of another; one without further axes says nothing."""
    sizes = {size for size in front if size != 1}
    return bool(sizes) and sizes <= set(shape[1:])


def _shapes(tree: Any) -> Iterator[tuple[int, ...]]:
    for leaf in tree_leaves(tree, is_leaf=lambda each: isinstance(each, PackedSequence)):
        if isinstance(leaf, Tensor):
            if leaf.dim():
                yield (leaf.size(0),) if leaf.is_nested else tuple(leaf.shape)
        elif isinstance(leaf, PackedSequence):
            yield (int(leaf.batch_sizes[0]),)
        elif isinstance(leaf, Mapping):
            yield from _shapes(list(leaf.values()))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _shapes([getattr(leaf, each.name) for each in fields(leaf)])
