"""Reweighting inside a graph that torch.compile makes: one node for each layer, and no break.

Dynamo traces hooks along with the model, and may not see the switching of `requires_grad` that
`persample.reweighting.autograd` relies on. So a layer's call is replaced by a function with a backward pass of its own:
the input gradient from ordinary operations, which the compiler is free to fuse, the gradients of weight and bias from
`gradients`, an operator that the compiler calls but does not look into. There the policy is asked, as always at run
time, so that nothing is compiled anew when coefficients are computed in one step and looked up in the next.

The operator sees one call, so the layer must have one only, and in the same graph as the model's entry. What is
known while tracing is kept on the Python side (`begin`, `claim`), by the identity of the graph that is traced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch.nn import functional as F

from persample.blocks.convolution.build import each, padding
from persample.reweighting.autograd import Pass, Uses, reaches, without_autocast
from persample.reweighting.layer import Layer

_HERE = Path(__file__).parents[2]


class Target:
    """What an operator in a compiled graph finds by its number: a reweighting, or one layer of it."""

    _numbers: ClassVar = count()
    _all: ClassVar[WeakValueDictionary[int, Target]] = WeakValueDictionary()

    def __init__(self, hooks: Any, layer: Layer | None = None) -> None:
        self.hooks, self.layer, self.number = hooks, layer, next(self._numbers)
        self.graph: object = None
        self.claimed: set[int] = set()
        self._all[self.number] = self

    @classmethod
    def get(cls, number: int) -> Target:
        """Returns the one with that number, if it still exists."""
        found = cls._all.get(number)
        if found is None:
            raise RuntimeError(
                "this compiled graph was made for a persample.reweight handle that is gone; call the model again, "
                "then backward()"
            )
        return found


_SCHEMA = (
    "(Tensor x, Tensor z, Tensor weight, Tensor? bias, SymInt batch, int number, bool needs_bias) -> (Tensor, Tensor)"
)


@contextmanager
def _recording() -> Iterator[None]:
    """Within it autograd can be used, as by a policy in an ordinary backward pass; torch hides it in an operation."""
    key = torch._C.DispatchKey.AutogradFunctionality
    hidden = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, hidden)


@torch.library.custom_op("persample::gradients", mutates_args=(), schema=_SCHEMA)
def _gradients(
    x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, batch: int, number: int, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    target = Target.get(number)
    layer: Any = target.layer
    current: Pass = target.hooks.forward
    if current.batch != batch:  # another forward pass came in between
        current = Pass(batch)
    uses = Uses(layer, current, [(x.detach(), z.detach())])
    policy_caller = target.hooks.policy_caller
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    with _recording():
        # autograd.grad(loss, inputs) runs the graph all the same, and wants nothing of the layer.
        if reaches(layer.members()):
            grad_weight, grad_bias = without_autocast(policy_caller.of_layer, uses, (True, needs_bias), z)
    # A policy may give no gradient; an operation of a graph always has its outputs.
    grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
    if bias is None or not needs_bias:
        return grad_weight, z.new_empty(0)
    return grad_weight, torch.zeros_like(bias) if grad_bias is None else grad_bias.to(weight.dtype)


@_gradients.register_fake
def _(
    x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, batch: int, number: int, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    empty = weight.new_empty(0) if bias is None or not needs_bias else torch.empty_like(bias)
    return torch.empty_like(weight), empty


@torch.library.custom_op("persample::output_gradient", mutates_args=(), schema="(Tensor grad, int number) -> Tensor")
def _output_gradient(grad: Tensor, number: int) -> Tensor:
    Target.get(number).hooks.forward.output_grad = grad.clone()  # the compiler may use the memory for other things
    return grad.clone()


@_output_gradient.register_fake
def _(grad: Tensor, number: int) -> Tensor:
    return torch.empty_like(grad)


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, number: int) -> Tensor:
        ctx.number = number
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.ops.persample.output_gradient(grad, ctx.number), None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Sequence[Any]) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.call = call
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, z: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        grad_weight, grad_bias = torch.ops.persample.gradients(x, z, weight, bias, *ctx.call)
        return (z @ weight.to(z.dtype)).to(x.dtype), grad_weight, grad_bias if ctx.call[-1] else None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[Any], call: Sequence[Any]
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.geometry, ctx.call = geometry, call
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, z: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        grad_weight, grad_bias = torch.ops.persample.gradients(x, z, weight, bias, *ctx.call)
        operands = z, x.to(z.dtype), weight.to(z.dtype)
        grad_x = torch.ops.aten.convolution_backward(*operands, None, *ctx.geometry, [True, False, False])[0]
        return grad_x.to(x.dtype), grad_weight, grad_bias if ctx.call[-1] else None, None, None


@torch.compiler.assume_constant_result
def begin(number: int) -> bool:
    """While tracing: the model's forward begins in this graph. Returns whether it does, and not a hook alone.

    Of a model of a user's class Dynamo compiles hooks and forward apart, so that no layer is in the hook's graph.
    """
    target = Target.get(number)
    target.claimed.clear()
    outermost = next(iter(TracingContext.extract_stack()), None)  # None: nothing is traced any more
    alone = outermost is None or _HERE in Path(outermost.filename).parents
    target.graph = None if alone else TracingContext.try_get()
    return not alone


@torch.compiler.assume_constant_result
def claim(root: int, number: int) -> bool:
    """While tracing: whether the layer may be one node of this graph; a second call of it is refused."""
    target, layer = Target.get(root), Target.get(number).layer
    assert layer is not None, "the number is a layer's"
    if number in target.claimed:
        layer.opaque = True
        raise ValueError(
            f"layer '{layer.path}' is called more than once in a forward pass, which a compiled graph cannot "
            "reweight as one layer. Call the model again: the layer will be left out of the graph. With "
            "fullgraph=True that is not possible."
        )
    if target.graph is None or target.graph is not TracingContext.try_get():
        return False
    target.claimed.add(number)
    layer.note = "nothing is tried out in a compiled graph"
    return True


def trainable(module: Any) -> bool:
    """Whether there is a weight gradient to replace."""
    return "weight" in module._parameters and module.weight.requires_grad


def traceable(module: Any, args: tuple, kwargs: dict) -> bool:
    """Whether `call` can stand for the module's forward."""
    if len(args) + len(kwargs) != 1:
        return False
    if isinstance(module, nn.Linear):
        return True
    x = args[0] if args else kwargs["input"]
    return module.padding_mode == "zeros" and padding(module) is not None and x.dim() == len(module.weight.shape)


def call(module: Any, x: Tensor, batch: int, number: int) -> Tensor:
    """Returns what the module's forward returns, with gradients from the policy of that number."""
    weight, bias = module.weight, module.bias
    arguments = batch, number, bias is not None and bias.requires_grad
    if isinstance(module, nn.Linear):
        return _Linear.apply(x, weight, bias, arguments)
    axes = weight.dim() - 2
    geometry = (
        each(module.stride, axes), padding(module), each(module.dilation, axes), module.transposed,
        each(module.output_padding, axes), module.groups,
    )  # fmt: skip
    return _Convolution.apply(x, weight, bias, geometry, arguments)


def watched_output(output: Tensor, number: int) -> Tensor:
    """Returns the output; its gradient is kept for the policy."""
    return _Output.apply(output, number)
