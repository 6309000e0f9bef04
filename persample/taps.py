"""The two nodes that `reweight` puts into the autograd graph in place of a layer's own weight gradient.

While a layer runs, its weight and bias do not require a gradient, so autograd computes only the input
gradient of the operation and keeps no x for it. Two nodes replace what was switched off:

    weight, bias ──▶ Gate ──token──▶ Tap ◀── output of the layer
                                      │
                                      ▼
                                the next layer

Tap passes the output on; in the backward pass it leaves (x, z) with its Gate. The engine runs a Gate when all
of its Taps have run, that is, when every use of the layer in this forward pass is known: a layer that is
called several times is one layer with one Gram matrix. The Gate asks the policy and returns the gradients of
weight and bias, which reach `.grad` through autograd as always, so that DDP, FSDP2, GradScaler, accumulation
and clipping see nothing unusual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Pass:
    """One forward pass of the model: its batch size and, once known, the gradient at its output."""

    def __init__(self, batch: int | None = None) -> None:
        self.batch = batch
        self.output_grad: Tensor | None = None


@dataclass(eq=False)
class Uses:
    """The uses of one layer in one forward pass: filled by Taps, emptied by the Gate."""

    layer: Any
    forward: Pass
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)


Gradients = Callable[[list[Uses], Sequence[bool]], list[Tensor | None]]
"""(uses of each layer, whether each weight and bias needs a gradient) → those gradients."""


def without_autocast(gradients: Gradients, group: list[Uses], needed: Sequence[bool], kind: str) -> list[Tensor | None]:
    """Returns gradients(group, needed) in the precision of x and z; `backward()` may be called inside autocast."""
    if not torch.is_autocast_enabled(kind):
        return gradients(group, needed)
    with torch.autocast(kind, enabled=False):
        return gradients(group, needed)


class Gate(torch.autograd.Function):
    """Gate.apply(gradients, group, weight, bias, weight, bias, …): a token for the Taps of a group of layers."""

    @staticmethod
    def forward(ctx: Any, gradients: Gradients, group: list[Uses], *parameters: Tensor | None) -> Tensor:
        """Returns the token, an empty tensor."""
        ctx.set_materialize_grads(False)  # Taps send no gradient along the token
        ctx.gradients, ctx.group = gradients, group
        ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in parameters]
        return torch.empty(0, device=next(p.device for p in parameters if p is not None))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns what the policy makes of the uses that were left."""
        met = [uses.found[0][1] for uses in ctx.group if uses.found]
        if not met:
            return None, None, *(None for _ in ctx.dtypes)
        found = without_autocast(ctx.gradients, ctx.group, ctx.needs_input_grad[2:], met[0].device.type)
        pairs = zip(found, ctx.dtypes, strict=True)
        return None, None, *(None if gradient is None else gradient.to(dtype) for gradient, dtype in pairs)


class Tap(torch.autograd.Function):
    """Tap.apply(output, x, token, uses): the output, watched."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, token: Tensor, uses: Uses) -> Tensor:
        """Returns the output itself."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)  # where a checkpoint wants to, it is dropped and recomputed
        ctx.uses, ctx.gate = uses, token.grad_fn
        # Neither the input itself nor a differentiable view of it: an in-place ReLU may follow. No copy.
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, z: Tensor | None) -> tuple[Tensor | None, ...]:
        """Leaves (x, z) with the Gate."""
        # autograd.grad(loss, inputs) never runs the Gate: leave nothing for a later backward pass to find.
        if z is not None and torch._C._will_engine_execute_node(ctx.gate):
            ctx.uses.found.append((ctx.saved_tensors[0].detach(), z.detach()))
        return z, None, None, None
