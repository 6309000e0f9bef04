"""The samples of a part of a batch: data are cut along dimension 0, or by whatever else tells sample from sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from persample.graph.containers import mapped


def part_of(tree: Any, part: slice, batch: int) -> Any:
    """Returns the tree with what holds `batch` samples cut to a part of them; all else is shared by the samples.

    Arguments:
        tree: inputs, targets, or both.
        part: start and stop.
        batch: how many samples there are.
    """
    return mapped(
        lambda leaf: _cut(leaf, part) if _holds_samples(leaf, batch) else leaf,
        tree,
        lambda node: isinstance(node, PackedSequence) or _lists_samples(node, batch),
    )


def _holds_samples(leaf: Any, batch: int) -> bool:
    if isinstance(leaf, PackedSequence):
        return int(leaf.batch_sizes[0]) == batch
    return _lists_samples(leaf, batch) or (isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.size(0) == batch)


def _lists_samples(node: Any, batch: int) -> bool:
    """Whether it is a list of something for each sample: its boxes and labels, its text."""
    return type(node) is list and len(node) == batch and all(isinstance(each, (Mapping, str)) for each in node)


def _cut(leaf: Any, part: slice) -> Any:
    if isinstance(leaf, PackedSequence):
        return pack_sequence(unpack_sequence(leaf)[part], enforce_sorted=leaf.sorted_indices is None)
    if isinstance(leaf, Tensor) and leaf.is_nested:
        return torch.nested.as_nested_tensor(list(leaf.unbind()[part]), layout=leaf.layout)
    if isinstance(leaf, list) or leaf.layout is torch.strided:
        return leaf[part]
    return leaf.index_select(0, torch.arange(part.start, part.stop, device=leaf.device))  # sparse: it has no slices
