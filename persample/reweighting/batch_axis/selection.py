"""What derives from the batch in a forward pass, and what from entries that were selected of it, or placed by data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from persample.graph.provenance import Provenance


def _aten(names: str) -> frozenset[Any]:
    return frozenset(getattr(torch.ops.aten, name) for name in names.split())


class Watch(Provenance):
    """Sees in a forward pass what derives from the batch, what from entries that were selected of that, and what lies
    where data say: the rows that a mask picks, or of a packed sequence, lie elsewhere in the next batch."""

    _SELECTED, _PLACED = 1 << 1000, 1 << 1001  # beyond the bits of any number of inputs
    _SELECTING = _aten("index index_select gather masked_select take sort topk nonzero _pack_padded_sequence")
    _PLACING = _aten("nonzero masked_select _pack_padded_sequence _unique2 unique_dim unique_consecutive")
    _PUTTING = _aten(
        "copy_ index_put index_put_ index_add index_add_ index_copy index_copy_ scatter scatter_ scatter_add "
        "scatter_add_ masked_scatter masked_scatter_"
    )
    """What they return is laid out as their first argument is: they put rows back, as `pad_packed_sequence` does."""

    def selected(self, tensor: Tensor) -> bool:
        """Whether the tensor derives from selected entries."""
        return bool(self._marks(tensor) & self._SELECTED)

    def placed(self, tensor: Tensor) -> bool:
        """Whether data say where the tensor's rows lie."""
        return bool(self._marks(tensor) & self._PLACED)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Does what the operation does."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        operation = func.overloadpacket
        put_back = operation in self._PUTTING and not self.placed(first)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if put_back:
            self._clear(result, self._PLACED)
        marks = self._SELECTED * (operation in self._SELECTING and self.may_be_data(first))
        if operation in self._PLACING or (operation is torch.ops.aten.index and _masks(args[1])):
            marks |= self._PLACED * any(
                self.may_be_data(each) for each in tree_leaves(args) if isinstance(each, Tensor)
            )
        for each in tree_leaves(result) if marks else ():
            self._mark(each, marks)
        return result


def _masks(indices: Sequence[Tensor | None]) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)
