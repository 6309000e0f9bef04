"""Data that are no tensors: the error of a model that does not take them says what they are, and what to give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves


@contextmanager
def explained(name: str, data: Any, taker: str) -> Iterator[None]:
    """Raises `TypeError` in words of ours where the context fails for a type and the data hold what is no tensor.

    Args:
        name: of the argument.
        data: given for it.
        taker: who takes it.
    """
    try:
        yield
    except (TypeError, AttributeError) as error:
        kind = _unusual(data)
        if kind is None:
            raise
        raise TypeError(f"{taker} does not take {name} of this kind: {kind} ({error})") from error


def _unusual(data: Any) -> str | None:
    """What is no tensor among the data, and what to give instead; None where nothing stands out."""
    if data is None:
        return "got None. Give what a call takes: a tensor, a tuple of arguments or a dict of keyword arguments"
    leaves = tree_leaves(data)
    if any(isinstance(leaf, (np.ndarray, np.generic)) for leaf in leaves):
        return "got a numpy.ndarray. torch.from_numpy(array) makes a tensor of it"
    if isinstance(data, (list, tuple)) and data and all(isinstance(leaf, (int, float)) for leaf in leaves):
        return f"got a {type(data).__name__} of numbers. torch.tensor(numbers) makes a tensor of it"
    if len(leaves) == 1 and leaves[0] is data and not isinstance(data, Tensor):
        return f"got a {type(data).__name__}. Give the tensors of one batch"
    return None
