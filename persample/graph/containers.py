"""Trees of data as models take them: besides what torch's trees look into, mappings, dataclasses and objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from persample.errors import UnsupportedError


def mapped(change: Callable[[Any], Any], tree: Any, is_leaf: Callable[[Any], bool] = lambda node: False) -> Any:
    """Returns the tree with other leaves; containers in which nothing changes are the same, the others copies.

    Raises:
        UnsupportedError: a container that cannot be changed.

    >>> from collections import UserDict
    >>> from persample.graph.containers import mapped
    >>> mapped(lambda leaf: leaf + 1, (1, [UserDict(a=2)]))
    (2, [{'a': 3}])
    """
    inside: set[int] = set()
    """The containers that the present one is in."""

    def at(leaf: Any) -> Any:
        held = None if is_leaf(leaf) or id(leaf) in inside else contents(leaf)
        if held is None:
            return change(leaf)
        inside.add(id(leaf))
        found = {key: tree_map(at, value, is_leaf=is_leaf) for key, value in held.items()}
        inside.discard(id(leaf))
        others = {key: value for key, value in found.items() if value is not held[key]}
        return _with(leaf, others) if others else leaf

    return tree_map(at, tree, is_leaf=is_leaf)


def contents(leaf: Any) -> dict[Any, Any] | None:
    """What is inside of a leaf of torch's trees, by key or attribute; None where it is none of our containers."""
    if isinstance(leaf, (Tensor, type, nn.Module)):
        return None
    if isinstance(leaf, Mapping):
        return dict(leaf)
    if is_dataclass(leaf):
        return {each.name: getattr(leaf, each.name) for each in fields(leaf) if hasattr(leaf, each.name)}
    return dict(vars(leaf)) if hasattr(leaf, "__dict__") and not callable(leaf) else None


def _with(leaf: Any, others: Mapping[Any, Any]) -> Any:
    """A copy of a container with some other contents."""
    try:
        new = copy(leaf)
        for key, value in others.items():
            if isinstance(leaf, Mapping):
                new[key] = value
            else:
                object.__setattr__(new, key, value)  # frozen dataclasses as well
    except (TypeError, AttributeError) as error:
        raise UnsupportedError(
            f"a {type(leaf).__name__} among the inputs or targets cannot be copied with the samples of a part of the "
            f"batch: {error}. Give a dict, a tuple or a dataclass in its place"
        ) from error
    return new
