"""The node that `reweight` puts into the autograd graph in place of a layer's own weight gradient.

While a layer runs, its weight and bias do not require a gradient, so autograd computes only the input
gradient of the operation and keeps no x for it. A Tap replaces what was switched off:

    weight, bias ──▶ Tap ◀── output of the layer          jointly:   all weights ──▶ Gate ──token──▶ Tap ◀── output
                      │                                                                               │
                      ▼                                                                               ▼
                the next layer                                                                 the next layer

Tap passes the output on; in the backward pass it adds (x, z) to the uses of its layer. The last Tap of a layer that
this backward pass runs knows every use of the layer in that forward pass: a layer that is called several times
is one layer with one Gram matrix. It asks the policy and returns the gradients of weight and bias, which reach
`.grad` through autograd as always, so that DDP, FSDP2, GradScaler, accumulation and clipping see nothing unusual.

Where the policy is asked about all layers at once, one Gate takes their weights. The engine runs it when all Taps
have run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

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
    """The uses of one layer in one forward pass: found by Taps, taken away by the last of them, or by the Gate."""

    layer: Any
    forward: Pass
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    taps: list[ref] = field(default_factory=list)
    _backward: int = -1
    _left: int = 0

    def met(self, x: Tensor | None, z: Tensor | None) -> bool:
        """A Tap runs: adds the use, if there is one. Returns whether no more will run in this backward pass."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward, self.found = backward, []  # an exception may have ended the one before
            self._left = 1 if len(self.taps) == 1 else sum(_runs(tap()) for tap in self.taps)
        if x is not None and z is not None:
            self.found.append((x.detach(), z.detach()))
        self._left -= 1
        return self._left == 0


Gradients = Callable[[Any, Sequence[bool]], Sequence[Tensor | None]]
"""(the uses of a layer or of several, whether each weight and bias needs a gradient) → those gradients."""


def without_autocast(gradients: Gradients, uses: Any, needed: Sequence[bool], kind: str) -> Sequence[Tensor | None]:
    """Returns gradients(uses, needed) in the precision of x and z; `backward()` may be called inside autocast."""
    if not torch.is_autocast_enabled(kind):
        return gradients(uses, needed)
    with torch.autocast(kind, enabled=False):
        return gradients(uses, needed)


def _runs(node: Any) -> bool:
    """Whether the backward pass that is under way runs a node of the graph; None is one that is gone."""
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # said of a leaf whose gradient autograd.grad was asked for
        return True


class Tap(torch.autograd.Function):
    """Tap.apply(output, x, uses, gradients, weight, bias): the output, watched; bias None where it needs no gradient.

    Jointly it is Tap.apply(output, x, uses, None, token, None).
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, uses: Uses, gradients: Gradients | None, *sources: Tensor | None
    ) -> Tensor:
        """Returns the output itself."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)  # where a checkpoint wants to, it is dropped and recomputed
        ctx.uses, ctx.gradients = uses, gradients
        uses.taps.append(ref(ctx))
        # Neither the input itself nor a differentiable view of it: an in-place ReLU may follow. No copy.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, z: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns z, and from the last Tap of a layer the gradients of its weight and bias."""
        return _leave_marked(ctx, z) if torch.is_grad_enabled() else _leave(ctx, z)


def _leave(ctx: Any, z: Tensor | None) -> tuple[Tensor | None, ...]:
    _, _, (source, _), *bias = ctx.next_functions
    # autograd.grad(loss, inputs) wants no weight gradient: ask nothing, leave nothing for a later backward pass.
    if not _runs(source) and not (bias and _runs(bias[0][0])):
        return z, None, None, None, None, None
    uses: Uses = ctx.uses
    complete = uses.met(None if z is None else ctx.saved_tensors[0], z)
    if not complete or ctx.gradients is None or not uses.found:
        return z, None, None, None, None, None
    needed, kind = ctx.needs_input_grad[4:], uses.found[0][1].device.type
    if torch.is_autocast_enabled(kind):
        return z, None, None, None, *without_autocast(ctx.gradients, uses, needed, kind)
    return z, None, None, None, *ctx.gradients(uses, needed)


_leave_marked = once_differentiable(_leave)  # with create_graph=True: to differentiate its result is refused


class Gate(torch.autograd.Function):
    """Gate.apply(gradients, group, weight, bias, weight, bias, …): a token for the Taps of a group of layers."""

    @staticmethod
    def forward(ctx: Any, gradients: Gradients, group: list[Uses], *parameters: Tensor | None) -> Tensor:
        """Returns the token, an empty tensor."""
        ctx.set_materialize_grads(False)  # Taps send no gradient along the token
        ctx.gradients, ctx.group = gradients, group
        return torch.empty(0, device=next(p.device for p in parameters if p is not None))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns what the policy makes of the uses that were left."""
        for uses in ctx.group:
            if uses._backward != torch._C._current_graph_task_id():
                uses.found = []  # of a backward pass that an exception ended
        met = [uses.found[0][1] for uses in ctx.group if uses.found]
        if not met:
            return None, None, *(None for _ in ctx.needs_input_grad[2:])
        return None, None, *without_autocast(ctx.gradients, ctx.group, ctx.needs_input_grad[2:], met[0].device.type)
