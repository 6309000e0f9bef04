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
from torch.autograd.graph import get_gradient_edge

_SECOND = (
    b"gradients of a model that persample.reweight reweights cannot be differentiated again: they do not depend on the "
    b"weights. Run the forward pass whose gradients the loss depends on inside `with optimizer.paused():` (with "
    b"persample.reweight itself: `with handle.paused():`): it is plain there, so that its gradients can be "
    b"differentiated, and counts as no backward pass of the optimiser"
)


class Pass:
    """One forward pass of the model: its batch size and, once known, the gradient at its output.

    `apart`: it is none of the model's own forward, but a layer that was called by hand.
    """

    def __init__(self, batch: int | None = None, *, apart: bool = False) -> None:
        self.batch, self.apart = batch, apart
        self.output_grad: Tensor | None = None
        self.question: Callable[[], None] | None = None
        """To be asked in the first backward pass: what its losses say of the samples."""


@dataclass
class _Finds:
    """What the Taps of a layer have found in one backward pass, and how many of them it has still to run."""

    uses: list[tuple[Tensor, Tensor]]
    numbers: list[int]
    left: int


@dataclass(eq=False)
class Uses:
    """The uses of one layer in one forward pass, (x, z) each, as the backward pass that is under way has found them."""

    layer: Any
    forward: Pass
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    """Which call of the layer each of them is, where there are several."""
    taps: list[ref] = field(default_factory=list)
    held: dict[int, Any] = field(default_factory=dict)
    """What each call holds of this batch, where data place rows: see `persample.reweighting.batch_axis.segments`."""
    _finds: dict[int, _Finds] = field(default_factory=dict)
    """By backward pass: one may run inside another, and an exception may have ended one."""

    def met(self, node: Any, x: Tensor | None, z: Tensor | None) -> bool:
        """A Tap runs, `node`: adds the use, if there is one. Returns whether no more will run in this backward pass."""
        backward = torch._C._current_graph_task_id()
        finds = self._finds.get(backward)
        if finds is None:
            # The engine does not say of the node that a backward pass starts at that it runs it.
            others = sum(_runs(tap()) for tap in self.taps if tap() is not node)
            finds = self._finds[backward] = _Finds([], [], 1 + others)
        if x is not None and z is not None:
            finds.uses.append((x.detach(), z.detach()))
            finds.numbers.append(node.number)
        finds.left -= 1
        return finds.left == 0

    def take(self) -> None:
        """Makes what this backward pass has found the uses."""
        finds = self._finds.pop(torch._C._current_graph_task_id(), None)
        self.found, self.numbers = ([], []) if finds is None else (finds.uses, finds.numbers)


Gradients = Callable[[Any, Sequence[bool]], Sequence[Tensor | None]]
"""(the uses of a layer or of several, whether each weight and bias needs a gradient) → those gradients."""


def without_autocast(gradients: Gradients, uses: Any, needed: Sequence[bool], z: Tensor) -> Sequence[Tensor | None]:
    """Returns gradients(uses, needed) in the precision of x and z; `backward()` may be called inside autocast."""
    if not torch._C._is_any_autocast_enabled():
        return gradients(uses, needed)
    with torch.autocast(z.device.type, enabled=False):
        return gradients(uses, needed)


def reaches(weights: Sequence[Tensor | None]) -> bool:
    """Whether the backward pass that is under way gives one of these leaves a gradient."""
    return any(_runs(get_gradient_edge(each).node) for each in weights if each is not None and each.requires_grad)


def upcoming(uses: Uses) -> bool:
    """Whether the backward pass that is under way runs a Tap of these uses, and wants the gradient of their weight."""
    nodes = [node for node in (tap() for tap in uses.taps) if node is not None]
    return any(_runs(node) and _runs(source) for node in nodes for source, _ in node.next_functions[2:])


def _runs(node: Any) -> bool:
    """Whether the backward pass that is under way runs a node of the graph; None is one that is gone."""
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # said of a leaf whose gradient autograd.grad was asked for
        return True


class Tap(torch.autograd.Function):
    """attach(output, x, uses, gradients, weight, bias): the output, watched; bias None where it needs no gradient.

    Jointly it is attach(output, x, uses, None, token, None).
    """

    passes_on = True
    """Output k is input k, as `persample.attribution.proof` wants to know."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, uses: Uses, gradients: Gradients | None, *sources: Tensor | None
    ) -> Tensor:
        """Returns the output itself."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)  # where a checkpoint wants to, it is dropped and recomputed
        ctx.uses, ctx.gradients, ctx.number = uses, gradients, len(uses.taps)
        uses.taps.append(ref(ctx))
        # Neither the input itself nor a differentiable view of it: an in-place ReLU may follow. No copy.
        return output.detach()

    @staticmethod
    @torch.compiler.disable  # where a compiled step calls backward(), Dynamo would trace the policy
    def backward(ctx: Any, z: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns z, and from the last Tap of a layer the gradients of its weight and bias."""
        if not torch.is_grad_enabled():
            return _leave(ctx, z)
        with torch.no_grad():
            return _refusing(_leave(ctx, z))


attach: Callable[..., Tensor] = super(torch.autograd.Function, Tap).apply
"""Tap.apply without what it does for the transforms of torch.func, in which there are no Taps: half of its time."""


def _leave(ctx: Any, z: Tensor | None) -> tuple[Tensor | None, ...]:
    _, _, (source, _), *bias = ctx.next_functions
    # autograd.grad(loss, inputs) wants no weight gradient: ask nothing, leave nothing for a later backward pass.
    if not _runs(source) and not (bias and _runs(bias[0][0])):
        return z, None, None, None, None, None
    uses: Uses = ctx.uses
    gradients: Gradients | None = ctx.gradients
    if gradients is not None and z is not None and len(uses.taps) == 1:  # the usual case, in a few lines of code
        uses.found = [(ctx.saved_tensors[0].detach(), z.detach())]
    elif uses.met(ctx, None if z is None else ctx.saved_tensors[0], z) and gradients is not None:
        uses.take()
    else:
        return z, None, None, None, None, None
    if not uses.found:
        return z, None, None, None, None, None
    return z, None, None, None, *without_autocast(gradients, uses, ctx.needs_input_grad[4:], uses.found[0][1])


def _refusing(results: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The results under create_graph=True: to differentiate them is refused in words."""
    places = {place: result for place, result in enumerate(results) if result is not None}
    if not places:
        return results
    refuse = torch._C._functions.DelayedError(_SECOND, len(places))
    refused: Any = refuse(*[result.detach().requires_grad_() for result in places.values()])
    places = dict(zip(places, (refused,) if len(places) == 1 else refused, strict=True))
    return tuple(places.get(place) for place in range(len(results)))


class Gate(torch.autograd.Function):
    """Gate.apply(gradients, group, weight, bias, weight, bias, …): a token for the Taps of a group of layers."""

    @staticmethod
    def forward(ctx: Any, gradients: Gradients, group: list[Uses], *parameters: Tensor | None) -> Tensor:
        """Returns the token, an empty tensor."""
        ctx.set_materialize_grads(False)  # Taps send no gradient along the token
        ctx.gradients, ctx.group = gradients, group
        return torch.empty(0, device=next(p.device for p in parameters if p is not None))

    @staticmethod
    @torch.compiler.disable  # where a compiled step calls backward(), Dynamo would trace the policy
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns what the policy makes of the uses that were left."""
        if not torch.is_grad_enabled():
            return _answer(ctx)
        with torch.no_grad():
            return _refusing(_answer(ctx))


def _answer(ctx: Any) -> tuple[Tensor | None, ...]:
    for uses in ctx.group:
        uses.take()
    met = [uses.found[0][1] for uses in ctx.group if uses.found]
    if not met:
        return None, None, *(None for _ in ctx.needs_input_grad[2:])
    return None, None, *without_autocast(ctx.gradients, ctx.group, ctx.needs_input_grad[2:], met[0])
