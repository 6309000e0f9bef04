"""Calls of torch's functions, read as linear functions: what is read computes what was called, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from persample.reweighting.functions.linear_calls import read

pytestmark = pytest.mark.usefixtures("double")

CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "F.linear": lambda x, w, b: F.linear(x, w.mT, b),
    "x @ w": lambda x, w, b: x @ w,
    "torch.matmul": lambda x, w, b: torch.matmul(input=x, other=w),
    "linalg.matmul": lambda x, w, b: torch.linalg.matmul(x, w),
    "w.T @ x.T": lambda x, w, b: w.mT @ x.mT,
    "w.T @ vector": lambda x, w, b: w.mT @ x[(0,) * (x.dim() - 1)],
    "mm": lambda x, w, b: x.flatten(0, -2).mm(w),
    "mv": lambda x, w, b: torch.mv(w.mT, x[(0,) * (x.dim() - 1)]),
    "bmm": lambda x, w, b: torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), w.expand(x.shape[0], -1, -1)),
    "w[None]": lambda x, w, b: x[None] @ w[(None,) * (x.dim() - 1)],
    "inner": lambda x, w, b: torch.inner(x, w.mT),
    "inner the other way": lambda x, w, b: torch.inner(w.mT, x),
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, -2), w),
    "addmm scaled": lambda x, w, b: torch.addmm(b, x.flatten(0, -2), w, beta=2, alpha=-0.5),
    "addmm without input": lambda x, w, b: torch.addmm(b, x.flatten(0, -2), w, beta=0),
    "addmm from the left": lambda x, w, b: torch.addmm(b[:, None], w.mT, x.flatten(0, -2).mT),
    "addmm of one number": lambda x, w, b: b[:1].addmm(x.flatten(0, -2), w),
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x.reshape(len(x), -1, x.shape[-1]), w.expand(len(x), -1, -1)),
    "addmv": lambda x, w, b: torch.addmv(b, w.mT, x[(0,) * (x.dim() - 1)]),
    "tensordot": lambda x, w, b: torch.tensordot(x, w, 1),
    "tensordot by axes": lambda x, w, b: torch.tensordot(w, x, dims=([0], [-1])),
    "einsum": lambda x, w, b: torch.einsum("...i,io->...o", x, w),
    "einsum, implicit": lambda x, w, b: torch.einsum("ai, io", x.flatten(0, -2), w),
    "einsum, moved": lambda x, w, b: torch.einsum("io,ai->oa", [w, x.flatten(0, -2)]),
    "einsum, summed": lambda x, w, b: torch.einsum("ai,io->o", x.flatten(0, -2), w),
    "conv1d": lambda x, w, b: F.conv1d(x.flatten(0, -2)[None].mT, w.mT[:, :, None], b),
}


def gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    seeds = torch.linspace(-1, 2, output.numel()).view(output.shape)
    return list(torch.autograd.grad(output, inputs, seeds, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("name", CALLS)
@given(rows=st.lists(st.integers(1, 4), min_size=1, max_size=3), inp=st.integers(1, 4), out=st.integers(1, 4))
def test_what_is_read_is_what_was_called(name: str, rows: list[int], inp: int, out: int) -> None:
    x, weight, bias = torch.randn(*rows, inp), torch.randn(inp, out), torch.randn(out)
    leaves = [each.requires_grad_() for each in (x, weight, bias)]
    seen: list[object] = []

    class Seen(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            with torch._C.DisableTorchFunctionSubclass():
                call = read(
                    func, lambda each: each is weight or getattr(each, "_base", None) is weight, args, kwargs or {}
                )
                if call is not None:
                    seen.append(func)
                    assert call.weight is weight or call.weight._base is weight
                    assert call.weight.shape[:2] == (out, inp)
                    return call.back(call.run(call.weight, call.bias))
                result = func(*args, **(kwargs or {}))  # type: ignore[operator]
            return result.as_subclass(Seen) if type(result) is Tensor and result._base is weight else result

    expected = CALLS[name](*leaves)
    slopes = gradients(expected, *leaves)
    weight.__class__ = Seen
    try:
        found = CALLS[name](*leaves)
    finally:
        weight.__class__ = Tensor
    assert len(seen) == 1, "it was read"
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, *leaves), slopes)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: w @ w.mT,  # parameters alone
        lambda x, w: x @ w[0],  # a vector
        lambda x, w: torch.einsum("ai,io->aio", x, w),
        lambda x, w: torch.einsum("ai,io->a", x, w),
        lambda x, w: torch.einsum("ai,ii->a", x, w),
        lambda x, w: torch.einsum("ai,io,ao->a", x, w, x),
        lambda x, w: torch.tensordot(x, w, 2),
        lambda x, w: x * w,
        lambda x, w: torch.bmm(x[None], torch.stack([w])),
        lambda x, w: torch.matmul(x, torch.stack([w, w])),
    ],
)
def test_what_is_no_linear_layer_is_left(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    weight = torch.randn(3, 3)
    x, seen = torch.randn(3, 3), []

    class Seen(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            with torch._C.DisableTorchFunctionSubclass():
                own = lambda each: isinstance(each, Tensor) and (each is weight or each._base is weight)  # noqa: E731
                seen.append(read(func, own, args, kwargs or {}))
                result = func(*args, **(kwargs or {}))  # type: ignore[operator]
            return result.as_subclass(Seen) if isinstance(result, Tensor) else result

    weight.__class__ = Seen
    function(x, weight)
    assert seen
    assert all(each is None for each in seen)


def test_a_convolution_is_one_geometry() -> None:
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(6, 2, 3, 3)
    first, second, other = (
        read(F.conv2d, lambda each: each is weight, (x, weight), {"padding": padding, "groups": 2, "stride": stride})
        for padding, stride in ((1, 1), (1, (1, 1)), ("same", 1))
    )
    assert first.geometry is second.geometry is not other.geometry
    assert torch.equal(other.run(weight, None), F.conv2d(x, weight, padding="same", groups=2))
    across = read(F.conv_transpose2d, lambda each: each is weight, (x[:, :3].repeat(1, 2, 1, 1), weight, None, 2), {})
    assert across.geometry.stride == (2, 2)
    assert across.geometry.weight.shape == weight.shape
