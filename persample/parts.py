"""Where the weight and the bias of a layer are: a parameter, or rows of one.

Attention keeps the projections of queries, keys and values in one parameter; where these have different inputs they
are two or three layers, each with rows of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from persample.weights import Layer


@dataclass(frozen=True)
class Part:
    """Rows start … stop − 1 of a parameter, along its first axis."""

    param: Tensor
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        """Whether these are all rows."""
        return self.start == 0 and self.stop == len(self.param)

    def of(self, tensor: Tensor) -> Tensor:
        """Returns these rows of a tensor that is like the parameter: a view, or the tensor itself."""
        return tensor if self.whole else tensor[self.start : self.stop]

    def meets(self, other: Part) -> bool:
        """Whether the two have rows in common.

        >>> parameter = nn.Parameter(torch.zeros(6, 2))
        >>> Part(parameter, 0, 4).meets(Part(parameter, 3, 6))
        True
        """
        return self.param is other.param and self.start < other.stop and other.start < self.stop


Parts = tuple[Part | None, Part | None]
"""(weight, bias) of a layer; None for what it has not."""


def parts_of(layer: Layer) -> Parts:
    """Returns where the weight and the bias of a layer are.

    (None, None) for a function whose bias is no parameter and no rows of one.
    """
    if layer.module is not None:
        own = layer.module._parameters
        return _all_of(own.get("weight")), _all_of(own.get("bias"))
    assert layer.source is not None, "a function's layer is made with one"
    weight, bias = layer.source()
    owners = [*layer.owners, None]
    found = _rows(weight, owners[0]), _rows(bias, owners[1])
    return (None, None) if found[0] is None or (bias is not None and found[1] is None) else found


def _all_of(param: Tensor | None) -> Part | None:
    return None if param is None else Part(param, 0, len(param))


def _rows(own: Tensor | None, owner: Tensor | None) -> Part | None:
    """Where in a parameter a function's weight or bias is."""
    if own is None or owner is None or not owner.is_leaf or own.shape[1:] != owner.shape[1:]:
        return None
    if not own.is_contiguous() or not owner.is_contiguous():
        return _all_of(owner) if own is owner else None
    first = (own.storage_offset() - owner.storage_offset()) // max(1, owner[0].numel())
    return Part(owner, first, first + len(own))
