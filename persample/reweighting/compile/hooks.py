"""The hooks of `persample.reweight` as torch.compile is to see them: what they put into a graph is in `compiled`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from persample.reweighting.autograd import Pass
from persample.reweighting.compile import operators
from persample.reweighting.compile.operators import Target
from persample.reweighting.hooks import ForwardHooks, batch_size
from persample.reweighting.layer import Layer


class TracedHooks:
    """Stand for those of `eager`, which they fall back to, at the price of a break in the graph."""

    def __init__(self, eager: ForwardHooks) -> None:
        self._eager, self._root = eager, Target(eager)
        self._targets = {layer: Target(eager, layer) for layer in eager.layers.values()}

    def number(self, layer: Layer) -> int:
        """Returns by what number operators in a graph find the layer."""
        return self._targets[layer].number

    def enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The model's forward begins."""
        if self._eager.policy_caller.paused:
            return
        if self._eager.policy_caller.joint:
            _outside(self._eager.enter_model, module, args, kwargs)
            return
        if not operators.begin(self._root.number):
            _outside(self._eager.enter_model, module, args, kwargs)
            return
        self._eager.forward = Pass(batch_size(args, kwargs))
        self._eager.uses = {}

    def leave_model(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """It ends, in the graph or outside, as it began."""
        eager = self._eager
        if eager.policy_caller.paused:
            return None
        if eager._passes or eager.policy_caller.joint or (eager.outputs and not isinstance(output, Tensor)):
            return _outside(eager.leave_model, module, args, output)
        eager.uses = None
        if eager.outputs and torch.is_grad_enabled():
            return operators.watched_output(output, self._root.number)
        return None

    def before(self, layer: Layer, number: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A layer's forward begins."""
        if (
            torch.is_grad_enabled()
            and not self._eager.policy_caller.paused
            and operators.trainable(module)
            and not self._in_graph(layer, number, module, args, kwargs)
        ):
            _outside(self._eager.before, layer, module, args, kwargs)

    def after(
        self, layer: Layer, number: int, module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> Tensor | None:
        """It ends; in the graph its output is computed again, and this one never."""
        if not torch.is_grad_enabled() or self._eager.policy_caller.paused:
            return None
        if layer.off:
            return _outside(self._eager.after, layer, module, args, kwargs, output)
        if not operators.trainable(module):
            return None
        layer.called = True
        x = args[0] if args else kwargs["input"]
        batch = self._eager.forward.batch
        assert batch is not None, "_in_graph has checked"
        return operators.call(module, x, batch, number)

    def _in_graph(self, layer: Layer, number: int, module: nn.Module, args: tuple, kwargs: dict) -> bool:
        eager = self._eager
        if eager.policy_caller.joint or layer.opaque or eager.forward.batch is None:
            return False
        if not operators.traceable(module, args, kwargs):
            return False
        return operators.claim(self._root.number, number)


@torch.compiler.disable(
    reason="persample.reweight puts a layer into a compiled graph only if it is called once in a forward pass, in the "
    "graph that the model's hooks begin in (for a model of a class of your own Dynamo compiles these apart), with zero "
    "padding, and without joint=True; leave fullgraph=True out"
)
def _outside(function: Callable[..., Any], *args: Any) -> Any:
    """Calls the function as it is: a break in a compiled graph."""
    return function(*args)
