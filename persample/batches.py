"""How many samples a model is called with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves


def batch_size(args: tuple, kwargs: dict) -> int | None:
    """Returns the length of axis 0 of the first tensor that has an axis, or the sequences of the first packed batch.

    Also inside mappings (the batches of tokenizers) and dataclasses; None where there is no tensor.

    >>> batch_size((), {"mask": None, "tokens": torch.zeros(4, 7)})
    4
    """
    if args and isinstance(args[0], Tensor) and args[0].dim():
        return args[0].shape[0]
    return next(_sizes((args, kwargs)), None)


def _sizes(tree: Any) -> Iterator[int]:
    for leaf in tree_leaves(tree, is_leaf=lambda each: isinstance(each, PackedSequence)):
        if isinstance(leaf, Tensor):
            if leaf.dim():
                yield leaf.shape[0]
        elif isinstance(leaf, PackedSequence):
            yield int(leaf.batch_sizes[0])
        elif isinstance(leaf, Mapping):
            yield from _sizes(list(leaf.values()))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _sizes([getattr(leaf, each.name) for each in fields(leaf)])
