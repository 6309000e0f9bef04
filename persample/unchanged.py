"""Whether parameters are those that a batch was captured with, for reductions that use them again.

Versions do not tell: fused optimizers and `parameter.data` raise none. So the bits are added up, as integers modulo
2^64: exact, in any order, and what a step changes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Unchanged:
    """Remembers the parameters' values by a sum of their bits, and other tensors by version."""

    def __init__(self, parameters: Iterable[Tensor], others: Iterable[Tensor] = ()) -> None:
        self._parameters = [
            each for each in parameters if type(each) in (Tensor, nn.Parameter) and each.layout == torch.strided
        ]
        self._versions = [(each, each._version) for each in others if not each.is_inference()]
        self.remember()

    def remember(self) -> None:
        """From now on the values are those that the parameters have."""
        self._sums = [bits(each) for each in self._parameters]

    def require(self, way: str) -> None:
        """Raises `RuntimeError` if they have others, or another tensor was changed in place.

        Args:
            way: the option that makes reductions use them again.
        """
        what = None
        if not all(torch.equal(bits(each), sum_) for each, sum_ in zip(self._parameters, self._sums, strict=True)):
            what = "parameters of the model were modified"
        elif any(each._version != version for each, version in self._versions):
            what = "a tensor of the inputs or targets was modified in place"
        if what is not None:
            raise RuntimeError(
                f"{what} after these per-sample gradients were captured, and with {way} every reduction uses them "
                "again. Form what you need before the optimizer's step, or capture the batch anew"
            )


@torch.no_grad()
def bits(tensor: Tensor) -> Tensor:
    """The sum of the bits of all entries, read as integers; of eight bytes where memory allows, which is fastest.

    >>> from persample.unchanged import bits
    >>> bits(torch.tensor([1.0])).item() == 0x3F800000
    True
    """
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.detach()
    size = real.element_size()
    if real.is_contiguous() and real.nbytes % 8 == 0 and real.storage_offset() * size % 8 == 0:
        return real.view(-1).view(torch.int64).sum()
    return real.view(_INTEGERS[size]).sum()
