"""Where the weight and the bias of a layer are: a parameter, or rows of one.

Attention keeps the projections of queries, keys and values in one parameter; where these have different inputs they
are two or three layers, each with rows of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from persample.reweighting.layer import Layer


@dataclass(frozen=True, eq=False)
class Part:
    """Rows start … stop − 1 of a parameter along its first axis, or of a matrix [in, out] along `axis` 1.

    Parts are equal where they are the same rows of the same parameter, whatever its numbers are.
    """

    param: Tensor
    start: int
    stop: int
    axis: int = 0

    def _key(self) -> tuple[int, ...]:
        return id(self.param), self.start, self.stop, self.axis

    def __eq__(self, other: object) -> bool:  # of a dataclass, from Python 3.13 on, it would compare tensors
        return isinstance(other, Part) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @property
    def whole(self) -> bool:
        """Whether these are all rows."""
        return self.start == 0 and self.stop == self.param.shape[self.axis]

    def of(self, tensor: Tensor) -> Tensor:
        """Returns these rows of a tensor that is like the parameter: a view, or the tensor itself.

        Of a matrix [in, out] they are rows of its transpose: outputs come first, as in the weight of a linear layer.
        """
        own = tensor if self.whole else tensor.narrow(self.axis, self.start, self.stop - self.start)
        return own.t() if self.axis else own

    def meets(self, other: Part) -> bool:
        """Whether the two have entries in common.

        >>> parameter = nn.Parameter(torch.zeros(6, 2))
        >>> Part(parameter, 0, 4).meets(Part(parameter, 3, 6))
        True
        """
        return self.param is other.param and (
            self.axis != other.axis or (self.start < other.stop and other.start < self.stop)
        )


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
    found = part_of(weight, owners[0]), part_of(bias, owners[1])
    return (None, None) if found[0] is None or (bias is not None and found[1] is None) else found


def _all_of(param: Tensor | None) -> Part | None:
    return None if param is None else Part(param, 0, len(param))


def part_of(own: Tensor | None, owner: Tensor | None) -> Part | None:
    """Returns where in a parameter a function's weight or bias is; None where it is no rows of it."""
    if own is None or owner is None or not owner.is_leaf:
        return None
    if own is owner:
        return _all_of(owner)
    if not owner.is_contiguous():
        return None
    first = int(own.storage_offset() - owner.storage_offset())
    if own.shape[1:] == owner.shape[1:] and own.is_contiguous():
        first //= max(1, owner[0].numel())
        return Part(owner, first, first + len(own))
    if own.dim() == owner.dim() == 2 and own.shape[1] == len(owner) and _transposed(own, owner.shape[1]):
        return Part(owner, first, first + len(own), axis=1)
    return None


def _transposed(own: Tensor, row: int) -> bool:
    """Whether its rows are columns of a matrix with rows of that length; the stride of an axis of 1 says nothing."""
    strides = zip(own.shape, own.stride(), (1, row), strict=True)
    return all(size == 1 or stride == wanted for size, stride, wanted in strides)
