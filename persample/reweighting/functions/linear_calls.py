"""Which calls of torch's functions are linear functions of an input, with a weight: one table, from function to reader.

A reader says what a call computes in terms of `F.linear` or of a convolution, so that `x @ w`, `torch.addmm` and
`torch.einsum` need nothing of their own anywhere else:

    function(*args) = back(F.linear(x, weight, bias))      weight [out, inp], a view of the one that was given
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from persample.blocks.convolution.build import each

IsWeight = Callable[[Any], bool]


@dataclass(frozen=True)
class Call:
    """back(run(weight, bias)), where `run` is linear in x.

    `geometry` is that of a convolution: a module that has never run, with no numbers in its weight.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    back: Callable[[Tensor], Tensor] = lambda output: output
    geometry: nn.Module | None = None
    convolve: Callable[..., Tensor] | None = None

    def run(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns the output before `back`, with that weight and bias."""
        return (self.convolve or F.linear)(self.x, weight, bias)


def read(function: Any, is_weight: IsWeight, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    """Returns what a call computes; None where it is no linear function of data with one weight.

    Arguments:
        is_weight: whether an operand is a weight, or a view of one.

    >>> x, w = torch.randn(3, 2), torch.randn(2, 4)
    >>> call = read(torch.matmul, lambda operand: operand is w, (x, w), {})
    >>> call.x is x, list(call.weight.shape), torch.equal(call.back(call.run(call.weight, None)), x @ w)
    (True, [4, 2], True)
    """
    reader = READERS.get(function)
    if reader is None or kwargs.get("out") is not None:
        return None
    try:
        return reader(is_weight, *args, **kwargs)
    except TypeError:  # other arguments than the function has: it says so itself
        return None


def _linear(is_weight: IsWeight, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:
    only = is_weight(weight) and not is_weight(input) and weight.dim() == 2
    return Call(input, weight, bias) if only else None


def _matrix(weight: Tensor, other: Tensor) -> Tensor | None:
    """A weight of two axes; of one that is repeated along more, for each matrix of `other`, the one behind them."""
    more = weight.dim() - 2
    if more < 0 or (more and other.dim() < weight.dim()):
        return None
    sizes = (
        zip(weight.shape[:more], weight.stride()[:more], other.shape[-weight.dim() : -2], strict=True) if more else ()
    )
    if any(size > 1 and (stride or size != own) for size, stride, own in sizes):
        return None
    return weight[(0,) * more] if more else weight


def _product(is_weight: IsWeight, first: Tensor, second: Tensor) -> Call | None:
    """first @ second."""
    if is_weight(first) == is_weight(second):
        return None
    if is_weight(second):
        weight = _matrix(second, first)
        return None if weight is None else Call(first, weight.mT)
    weight = _matrix(first, second)
    if weight is None:
        return None
    return Call(second, weight) if second.dim() == 1 else Call(second.mT, weight, back=lambda output: output.mT)


def _matmul(is_weight: IsWeight, input: Tensor, other: Tensor, **_: Any) -> Call | None:
    return _product(is_weight, input, other)


def _mm(is_weight: IsWeight, input: Tensor, mat2: Tensor, **_: Any) -> Call | None:
    return _product(is_weight, input, mat2)


def _mv(is_weight: IsWeight, input: Tensor, vec: Tensor, **_: Any) -> Call | None:
    return _product(is_weight, input, vec)


def _reversed(is_weight: IsWeight, other: Tensor, input: Tensor) -> Call | None:
    return _product(is_weight, input, other)


def _plus(is_weight: IsWeight, input: Tensor, first: Tensor, second: Tensor, beta: Any, alpha: Any) -> Call | None:
    """beta·input + alpha·first @ second."""
    product = _product(is_weight, first, second)
    if product is None or is_weight(input):
        return None
    own = isinstance(input if input._base is None else input._base, nn.Parameter)
    if own and is_weight(second) and beta == alpha == 1 and input.shape == product.weight.shape[:1]:
        return Call(product.x, product.weight, input)

    def back(output: Tensor) -> Tensor:
        own = product.back(output)
        own = own if alpha == 1 else own * alpha
        return own if beta == 0 else own + input if beta == 1 else own + input * beta

    return Call(product.x, product.weight, back=back)


def _addmm(is_weight: IsWeight, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return _plus(is_weight, input, mat1, mat2, beta, alpha)


def _baddbmm(
    is_weight: IsWeight, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Any:
    return _plus(is_weight, input, batch1, batch2, beta, alpha)


def _addmv(is_weight: IsWeight, input: Tensor, mat: Tensor, vec: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return _plus(is_weight, input, mat, vec, beta, alpha)


def _tensordot(is_weight: IsWeight, a: Tensor, b: Tensor, dims: Any = 2, out: None = None) -> Call | None:
    """Σ over one axis of each."""
    if is_weight(a) == is_weight(b):
        return None
    axes = ([a.dim() - 1], [0]) if dims == 1 else dims
    if isinstance(axes, int | Tensor) or any(len(each) != 1 for each in axes):
        return None
    (x, (of_x,)), (weight, (of_weight,)) = (
        ((a, axes[0]), (b, axes[1])) if is_weight(b) else ((b, axes[1]), (a, axes[0]))
    )
    if weight.dim() != 2:
        return None
    weight = weight if of_weight % 2 else weight.mT
    first = is_weight(a)
    return Call(x.movedim(of_x, -1), weight, back=lambda output: output.movedim(-1, 0) if first else output)


def _inner(is_weight: IsWeight, input: Tensor, other: Tensor, **_: Any) -> Call | None:
    return _tensordot(is_weight, input, other, ([input.dim() - 1], [other.dim() - 1]))


def _einsum(is_weight: IsWeight, equation: Any, *operands: Any) -> Call | None:
    """Two operands, of which the weight has one axis that is summed and one that is kept."""
    if len(operands) == 1 and isinstance(operands[0], Sequence):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or sum(map(is_weight, operands)) != 1:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    named = list(zip(inputs.split(","), operands, strict=True))
    (of_x, x), (of_weight, weight) = named if is_weight(operands[1]) else named[::-1]
    if "->" not in equation:
        output = "..." * ("..." in of_x) + "".join(sorted(set(of_x.replace(".", "")) ^ set(of_weight)))
    letters = of_x.replace("...", "")
    if len(of_weight) != 2 or len(set(of_weight)) != 2 or len(set(letters)) != len(letters):
        return None
    summed = [each for each in of_weight if each in letters and each not in output]
    kept = [each for each in of_weight if each not in letters and each in output]
    if len(summed) != 1 or len(kept) != 1:
        return None
    rest = of_x.replace(summed[0], "")
    if not of_x.endswith(summed[0]):
        x = torch.einsum(f"{of_x}->{rest}{summed[0]}", x)
    weight = weight if of_weight == kept[0] + summed[0] else weight.mT
    before = f"{rest}{kept[0]}"
    return Call(x, weight, back=lambda y: y if before == output else torch.einsum(f"{before}->{output}", y))


def _convolution(
    function: Any,
    is_weight: IsWeight,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Call | None:
    if not is_weight(weight) or is_weight(input):
        return None
    names, axes = _GEOMETRY[function], weight.dim() - 2
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    own = tuple(
        (name, value if name == "groups" or isinstance(value, str) else each(value, axes))
        for name, value in sorted(given.items())
    )
    return Call(
        input, weight, bias, geometry=_geometry(function, tuple(weight.shape), own),
        convolve=lambda x, weight, bias: function(x, weight, bias, **given),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _geometry(function: Any, shape: tuple[int, ...], options: tuple[tuple[str, Any], ...]) -> nn.Module:
    """The same module for the same geometry."""
    given = dict(options)
    groups, kind = given.get("groups", 1), _MODULES[function]
    rows, columns = shape[0], shape[1] * groups
    channels = (rows, columns) if "Transpose" in kind.__name__ else (columns, rows)
    return kind(*channels, shape[2:], bias=False, device="meta", **given)


_MODULES: dict[Any, Any] = {
    F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d, F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d, F.conv_transpose3d: nn.ConvTranspose3d,
}  # fmt: skip
_GEOMETRY = {
    function: ("stride", "padding", "output_padding", "groups", "dilation")
    if "Transpose" in kind.__name__
    else ("stride", "padding", "dilation", "groups")
    for function, kind in _MODULES.items()
}

READERS: dict[Any, Callable[..., Call | None]] = {
    F.linear: _linear,
    torch.einsum: _einsum,
    torch.tensordot: _tensordot,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _reversed,
    torch.linalg.matmul: _matmul,
    **dict.fromkeys((torch.matmul, Tensor.matmul), _matmul),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _mm),
    **dict.fromkeys((torch.mv, Tensor.mv), _mv),
    **dict.fromkeys((torch.inner, Tensor.inner), _inner),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), _baddbmm),
    **dict.fromkeys((torch.addmv, Tensor.addmv), _addmv),
    **{function: partial(_convolution, function) for function in _MODULES},
}
"""Every function that is looked at."""
