"""A layer's gradient as one matrix, and its direction back in the parameters that the layer is made of."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fngd.optim.distributed import sharded_like, whole_tensor
from fngd.optim.layers import Part


def as_matrix(weight: Tensor, bias: Tensor | None, groups: int) -> Float[Tensor, "groups out inp"]:
    """Returns weight (and bias, as the last column) as one matrix a group; the weight is [out, inp / groups, *kernel].

    >>> as_matrix(torch.zeros(6, 2, 3, 3), torch.zeros(6), 2).shape
    torch.Size([2, 3, 19])
    """
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    return matrix if bias is None else torch.cat([matrix, bias.reshape(groups, -1, 1)], 2)


def gradient_of(part: Part) -> Tensor:
    """Returns the gradient of these rows of a parameter, whole."""
    assert part.param.grad is not None, "checked by the caller"
    return part.of(whole_tensor(part.param.grad))


def put(result: dict[Tensor, Tensor], part: Part, direction: Tensor) -> None:
    """Writes rows of a parameter's direction; rows that no layer has keep the gradient."""
    param = part.param
    rows = direction.reshape(part.of(param).shape).to(param.dtype)
    if part.whole:
        result[param] = sharded_like(rows.t() if part.axis else rows, param)
    else:
        assert param.grad is not None, "checked by the caller"
        if param not in result:
            result[param] = param.grad.clone()
        part.of(result[param]).copy_(rows)
