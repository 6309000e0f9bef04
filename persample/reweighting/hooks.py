"""The hooks of `persample.reweight` in a forward pass: they put Taps and Gates (`persample.reweighting.autograd`) into
its graph.

What a function does with a weight counts as a layer's call, too; `persample.reweighting.functions.layers` knows which
layer's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from persample.graph.batch_size import batch_shape, batch_size
from persample.reweighting.autograd import Gate, Pass, Uses, attach
from persample.reweighting.batch_axis import dry_run
from persample.reweighting.batch_axis.folded import Folded, Reading
from persample.reweighting.batch_axis.layout_probe import LayoutProbe
from persample.reweighting.batch_axis.selection import Watch
from persample.reweighting.functions.layers import FunctionLayers, renewed
from persample.reweighting.functions.linear_calls import Call
from persample.reweighting.layer import Layer
from persample.reweighting.other_uses import note_uses_besides
from persample.reweighting.policy import PolicyCaller

__all__ = ["ForwardHooks", "batch_size"]


class ForwardHooks:
    """What the hooks on a model and on its layers do, and what they know of the forward pass that runs.

    Arguments:
        model: the model.
        policy_caller: asks the policy in the backward pass.
        layers: by path; functions are added as they are met.
        axis_of: path → the batch axis, or how rows are folded, that the user gave.
        weights: parameters that functions may use → their names.
        outputs: whether to keep the gradient at the model's output.
    """

    def __init__(
        self,
        model: nn.Module,
        policy_caller: PolicyCaller,
        layers: dict[str, Layer],
        axis_of: Callable[[str], int | Folded | None],
        weights: dict[nn.Parameter, str],
        *,
        outputs: bool,
    ) -> None:
        self.policy_caller, self.layers, self.outputs = policy_caller, layers, outputs
        self.functions = FunctionLayers(weights, self._function, layers, axis_of)
        self.forward = Pass()
        self.uses: dict[str, Uses] | None = None
        """Of the layers that the running pass has met, by path; None outside of it."""
        self._token: Tensor | None = None  # of the Gate, where layers are asked jointly
        self._model = model
        self._running: Layer | None = None
        self._layout_probe = LayoutProbe(model, self.functions.watching)
        self._call: tuple[tuple, dict] = (), {}
        self._passes: list[Pass] = []  # under way, one inside the other; and those that Ctrl-C ended
        self._met = False  # whether a forward pass for training has been seen
        self._several = False  # whether the first tensor given to the model has had several rows
        self._seen: Watch | None = None  # while the first of them runs: what derives from the batch

    # --- the model ------------------------------------------------------------------------------------------

    def enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The model's forward begins: a new pass."""
        if self._layout_probe.running is not None or self.policy_caller.paused:
            return
        if module is not self._model or (isinstance(module, nn.DataParallel) and len(module.device_ids) > 1):
            raise RuntimeError(
                "this model is reweighted (persample.reweight), but nn.DataParallel runs copies of it, whose gradients "
                "have no samples of their own. Use DistributedDataParallel, or one device"
            )
        self.forward, self._running = Pass(self.samples(args, kwargs)), None
        self._layout_probe.forget()  # what a forward pass left that raised
        self._passes.append(self.forward)
        self.functions.leave_all()  # left over from a forward pass that Ctrl-C ended
        self.uses, self._token = {}, None
        if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return
        if self.policy_caller.joint:
            if not self._met and self.functions.watched:  # the Gate must know every layer beforehand
                with dry_run.dry_run(self._model):
                    self._layout_probe.rehearse(args, kwargs)
            self._join()
        self._call = args, kwargs
        self._layout_probe.begin(args, kwargs)
        if not self._met:
            self._follow(args, kwargs)
        self.functions.enter(self.functions.watched)

    def samples(self, args: tuple, kwargs: dict) -> int | None:
        """How many samples the model is called with."""
        if not self._several:
            self._several = batch_size(args, kwargs, first=True) not in (None, 1)
        axis = self._layout_probe.axis
        if axis:
            shape = batch_shape(args, kwargs, first=self._several)
            return shape[axis] if shape is not None and len(shape) > axis else None
        return batch_size(args, kwargs, first=self._several)

    def _follow(self, args: tuple, kwargs: dict) -> None:
        self._unfollow()  # left over from a forward pass that Ctrl-C ended
        self._seen = Watch(self._model)
        self._seen.follow((args, kwargs))
        self._seen.__enter__()

    def _unfollow(self) -> None:
        if self._seen is not None:
            self._seen.__exit__(None, None, None)
            self._seen = None

    def _has_rows(self, layer: Layer, x: Any) -> bool:
        """Whether the layer works on the batch, as far as the first forward pass has shown; asked while it runs."""
        if self._seen is None or not isinstance(x, Tensor):
            return layer.shared is None
        layer.selected |= self._seen.selected(x)
        layer.placed |= self._seen.placed(x)
        if not self._seen.may_be_data(x):
            layer.shared = "it works on what all samples share (its input does not come from the model's)"
        return layer.shared is None

    def _join(self) -> None:
        """One Gate for all layers: it runs when the last of their Taps has run."""
        for layer in self.layers.values():
            layer.switch_on()  # left over from a forward pass that Ctrl-C ended
        layers = [layer for layer in self.layers.values() if renewed(layer) and layer.parameters()]
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        if any(hasattr(parameter, "to_local") for parameter in parameters):
            raise ValueError("joint=True needs whole weights, but these are sharded (FSDP); ask layer by layer")
        if layers:
            self.uses = {layer.path: Uses(layer, self.forward) for layer in layers}
            self._token = Gate.apply(self.policy_caller.of_all, list(self.uses.values()), *parameters)

    def leave_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        """It ends, or raised an exception (output None)."""
        if self._layout_probe.running is not None or self.policy_caller.paused:
            return
        self._unfollow()
        interrupted = bool(self._passes) and self._passes.pop() is not self.forward
        # From here on a layer runs on its own: in a checkpoint's recomputation, or called directly.
        uses = {each.layer: each for each in (self.uses or {}).values() if each.taps}
        self.uses = self._token = None
        (args, kwargs), self._call = self._call, ((), {})
        self.functions.leave()
        if output is None:  # the forward raised
            return
        functions = sorted(path for path, layer in self.layers.items() if layer.module is None)
        if interrupted and functions:
            raise RuntimeError(
                "the model called itself in its own forward, and the inner call ended the watch over the weights that "
                f"functions use ({functions}): they would get the plain gradient. Give functions=False, or reweight a "
                "part of the model that does not call itself."
            )
        shape = batch_shape(args, kwargs, first=self._several) if self._layout_probe.new else None
        self._layout_probe.end(args, kwargs, output, uses, self.forward, shape or (), first=not self._met)
        if torch.is_grad_enabled() and not self._met:
            self._met = True
            self.functions.forget_called()
            if args or kwargs:  # else the pass was entered in a compiled graph, where there are no Taps
                self.policy_caller.tell_of(note_uses_besides(self.layers.values(), (args, kwargs), output))
        if self.outputs:
            first = _first_tensor(output)
            if first is not None and first.requires_grad:
                first.register_hook(partial(_keep_output_grad, self.forward))
        if self.policy_caller.follow is not None and torch.is_grad_enabled():
            reached = self.policy_caller.follow(self.forward.batch)
            for each in tree_leaves(output):
                if isinstance(each, Tensor) and each.requires_grad:
                    each.register_hook(lambda _: reached())

    # --- a layer --------------------------------------------------------------------------------------------

    def before(self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A layer's forward begins: its parameters are switched off."""
        self._running = layer
        # torch.func differentiates what it is given, and tensors inside it cannot be switched.
        if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or self.policy_caller.paused:
            return
        if self._seen is None or self._has_rows(layer, args[0] if args else kwargs.get("input")):
            layer.switch_off()

    def after(self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
        """It ends: they are switched on, and its output gets a Tap."""
        self._running = None
        if self._layout_probe.running is not None:
            self._layout_probe.note(layer, output)
            return None
        if not layer.off:
            # A reentrant checkpoint runs it without gradients first.
            first = self._layout_probe.new and not torch.is_grad_enabled() and layer.why_plain() is None
            if first and isinstance(output, Tensor):
                self._layout_probe.look(layer, tuple(output.shape), self.forward.batch)
            return None
        weight, *rest = layer.off
        layer.switch_on()
        if not isinstance(output, Tensor):  # the forward raised
            return None
        return self._tapped(layer, args[0] if args else kwargs["input"], output, weight, *rest)

    def _tapped(self, layer: Layer, x: Tensor, output: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not layer.called:
            layer.selected |= self._met  # whence its input comes has not been seen
            layer.called = True
        forward = self.forward if self.uses is not None else self._apart(output)
        if layer.axis is None or self._layout_probe.new:
            self._layout_probe.look(layer, tuple(output.shape), forward.batch)
        uses = None if self.uses is None else self.uses.get(layer.path)
        if self._token is not None and uses is not None:
            return attach(output, x, uses, None, self._token, None)
        if uses is None:
            uses = Uses(layer, forward)
            if self.policy_caller.follow is not None:
                self.policy_caller.followed.add(uses)
            if self.uses is not None:
                self.uses[layer.path] = uses
            elif layer.several_batches(tuple(output.shape)):
                uses.forward = Pass()  # recomputed in a checkpoint: of which pass is not known
        return attach(output, x, uses, self.policy_caller.of_layer, weight, bias)

    def _apart(self, output: Tensor) -> Pass:
        """The pass that a layer's call belongs to, of which the model's forward knows nothing.

        Recomputed in a checkpoint it is the latest one. Called by hand it may have another batch: only where samples
        are in front it is taken for that of the latest.
        """
        if torch._C._current_graph_task_id() >= 0 or self._passes:  # or a model that has called itself goes on
            return self.forward
        return Pass(self.forward.batch if output.shape[:1] == (self.forward.batch,) else None, apart=True)

    # --- a function -----------------------------------------------------------------------------------------

    def enter_owner(self, weights: list[nn.Parameter], module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The forward of a module begins that may use weights as functions do."""
        watching = torch.is_grad_enabled() and not self.policy_caller.paused
        self.functions.enter(weights if watching or self._layout_probe.running is not None else [])

    def leave_owner(self, module: nn.Module, args: tuple, output: Any) -> None:
        """It ends."""
        self.functions.leave()

    def _function(self, call: Call, name: str, axis: int | None) -> Tensor:
        """A linear function of a watched weight."""
        x, weight, bias = call.x, call.weight, call.bias
        training = torch.is_grad_enabled() or self._layout_probe.running is not None
        if self._running is not None or not (training and weight.requires_grad):
            return call.run(weight, bias)
        layer = self.functions.layer(name, call, self._used)
        if not self._has_rows(layer, x):
            return call.run(weight, bias)
        batch = self.forward.batch
        if layer.axis is None and axis is not None and batch is not None and x.shape[axis] == batch:
            layer.settle((*x.shape[:-1], len(weight)), batch, Reading(1, 1, axis))
        if self._layout_probe.running is not None:
            output = call.run(weight, bias)
            self._layout_probe.note(layer, output)
            return output
        layer.source = lambda: (weight, bias)
        output = call.run(weight.detach(), None if bias is None else bias.detach())
        return self._tapped(layer, x, output, *layer.parameters())

    def _used(self, layer: Layer) -> bool:
        """Whether the pass that runs has met the layer."""
        if self._layout_probe.running is not None:
            return layer in self._layout_probe.running
        uses = (self.uses or {}).get(layer.path)
        return uses is not None and bool(uses.taps)


def _first_tensor(tree: Any) -> Tensor | None:
    return next((leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.dim()), None)


def _keep_output_grad(forward: Pass, grad: Tensor) -> None:
    forward.output_grad = grad.detach()
