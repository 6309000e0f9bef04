"""Reweighting inside the backward pass: `loss.backward()` accumulates Σ_b c_b g_b instead of Σ_b g_b.

With g_b sample b's share of a layer's gradient and c what a policy returns (symbols: `persample.layers`).

How. While a layer runs, its own weight and bias do not require a gradient, so autograd computes only the
input gradient of the operation and keeps no x for it. Two nodes in the graph replace what was switched off:

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

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from persample.layers import LAYERS, LayerGrads, layer_grads

Policy = Callable[..., Any]
"""(layer path, LayerGrads) → factors [B], a pair of gradients or None; jointly, one dict by path → another."""


@dataclass(eq=False)
class _Pass:
    """One forward pass of the model: its batch size and, once known, the gradient at its output."""

    batch: int | None = None
    output_grad: Tensor | None = None


@dataclass(eq=False)
class _Uses:
    """The uses of one layer in one forward pass: filled by Taps, emptied by the Gate."""

    layer: _Layer
    forward: _Pass
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(eq=False)
class _Layer:
    path: str
    module: nn.Module
    axis: int | None
    off: list[nn.Parameter] = field(default_factory=list)
    called: bool = False

    def parameters(self) -> list[nn.Parameter | None]:
        """[weight, bias], or an empty list where the layer is to take the plain gradient."""
        if self.why_plain() is not None:
            return []
        bias = self.module._parameters.get("bias")
        return [self.module._parameters["weight"], bias if bias is not None and bias.requires_grad else None]

    def why_plain(self) -> str | None:
        own = self.module._parameters.get("weight")
        if own is None:
            return "its weight is computed from other parameters (parametrised)"
        if not own.requires_grad and all(own is not parameter for parameter in self.off):
            return "its weight is frozen"
        return None

    def switch_off(self) -> None:
        self.switch_on()  # left over from a forward pass that Ctrl-C ended
        for parameter in self.parameters():
            if parameter is not None:
                parameter.requires_grad_(False)
                self.off.append(parameter)

    def switch_on(self) -> None:
        while self.off:
            self.off.pop().requires_grad_(True)

    def check(self, uses: _Uses) -> list[tuple[Tensor, Tensor]]:
        """Returns the uses, emptied, when it is certain which of their axes counts samples."""
        found, uses.found = uses.found, []
        if self.axis is None:
            self.axis = _find_axis(self, found[-1][1], uses.forward.batch)
        sizes = {z.shape[self.axis] for _, z in found}
        if len(sizes) > 1:
            raise ValueError(
                f"layer '{self.path}' was called with batches of {sorted(sizes)} samples in one forward; "
                "its calls make one gradient per sample only if each has the same samples. Call the model "
                "once per batch."
            )
        return found

    def combine(self, grads: LayerGrads, answer: Any) -> tuple[Tensor | None, Tensor | None]:
        """Returns the (weight, bias) gradients that the policy's answer stands for."""
        if answer is None:
            return grads.weighted_sum(torch.ones(grads.batch_size, device=grads.device))
        if isinstance(answer, tuple) and len(answer) == 2:
            return answer
        if not isinstance(answer, Tensor) or answer.shape != (grads.batch_size,):
            returned = f"shape {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
            raise ValueError(
                f"the policy returned {returned} for layer '{self.path}'; allowed are None (the plain "
                f"gradient), a tensor of shape [{grads.batch_size}], one factor per sample, and a pair of "
                "the gradients of weight and bias themselves."
            )
        return grads.weighted_sum(answer)


def _find_axis(layer: _Layer, z: Tensor, batch: int | None) -> int:
    """The axis of the layer's output that counts samples; raises ValueError where that is not certain."""
    shape, remedy = list(z.shape), f"give reweight(..., batch_axis={{'{layer.path}': axis}})"
    if batch is None:
        raise ValueError(
            f"the batch size is unknown at layer '{layer.path}' (output of shape {shape}): the model's own "
            f"forward was not called with a tensor. Call the model itself, or {remedy}."
        )
    if not isinstance(layer.module, nn.Linear):
        if z.dim() == len(layer.module.kernel_size) + 2 and shape[0] == batch:  # type: ignore[arg-type]
            return 0
        raise ValueError(
            f"layer '{layer.path}' has an output of shape {shape}, but the model's input {batch} samples, "
            f"and axis 0 must count samples. If each of its {shape[0]} rows is to be a sample of its own, "
            f"{remedy.replace('axis}', '0}')}."
        )
    candidates = [axis for axis, size in enumerate(shape[:-1]) if size == batch]
    if len(candidates) == 1:
        return candidates[0]
    what = f"axes {candidates} all have that size" if candidates else "no axis before the last has that size"
    raise ValueError(
        f"cannot tell which axis of layer '{layer.path}' counts samples: its output has shape {shape}, the "
        f"model's input has {batch} samples, and {what}. Please {remedy}, or batch_axis=axis for all linear "
        "layers."
    )


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Reweighting, group: list[_Uses], *parameters: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)  # Taps send no gradient along the token
        ctx.handle, ctx.group = handle, group
        ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in parameters]
        return torch.empty(0, device=next(p.device for p in parameters if p is not None))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        met = [uses.found[0][1] for uses in ctx.group if uses.found]
        if not met:
            return None, None, *(None for _ in ctx.dtypes)
        device_type, needed = met[0].device.type, ctx.needs_input_grad[2:]
        if torch.is_autocast_enabled(device_type):  # backward() was called inside autocast
            with torch.autocast(device_type, enabled=False):
                gradients = ctx.handle._gradients(ctx.group, needed)
        else:
            gradients = ctx.handle._gradients(ctx.group, needed)
        return (
            None,
            None,
            *(
                None if gradient is None else gradient.to(dtype)
                for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
            ),
        )


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, token: Tensor, uses: _Uses) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)  # where a checkpoint wants to, it is dropped and recomputed
        ctx.uses, ctx.gate = uses, token.grad_fn
        # Neither the input itself nor a differentiable view of it: an in-place ReLU may follow. No copy.
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, z: Tensor | None) -> tuple[Tensor | None, ...]:
        # autograd.grad(loss, inputs) never runs the Gate: leave nothing for a later backward pass to find.
        if z is not None and torch._C._will_engine_execute_node(ctx.gate):
            ctx.uses.found.append((ctx.saved_tensors[0].detach(), z.detach()))
        return z, None, None, None


class _Inert:
    """What a copied or unpickled hook becomes: it does nothing."""

    def __call__(self, *_: Any, **__: Any) -> None:
        return None


class _Hook:
    """A hook whose copies are inert, so that copying or saving a model takes no optimiser along."""

    def __init__(self, function: Callable[..., Any]) -> None:
        # Dynamo would take the parameters for constants that need no gradient, and lose it: it may not look inside.
        self.function, self.opaque = function, torch.compiler.disable(function)

    def __call__(self, *args: Any) -> Any:
        return self.opaque(*args) if torch.compiler.is_dynamo_compiling() else self.function(*args)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Inert, ()


class Reweighting:
    """What `reweight` returns: ends the reweighting by `remove()` or at the end of a `with` block.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> handle = persample.reweight(model, lambda layer, grads: None)
    >>> model(torch.randn(5, 3)).sum().backward()  # None: the plain gradient
    >>> handle.remove()
    """

    def __init__(
        self, model: nn.Module, policy: Policy, layers: dict[str, _Layer], *, joint: bool, outputs: bool
    ) -> None:
        self._layers, self._policy, self._joint, self._outputs = layers, policy, joint, outputs
        self._forward = _Pass()
        self._asked: tuple[_Pass, dict[str, tuple]] | None = None  # while the policy runs
        self._gates: dict[str, tuple[Tensor, _Uses]] | None = None
        # The root's hook first: the model may be a layer itself.
        self._hooks = [
            model.register_forward_pre_hook(_Hook(self._enter_model), with_kwargs=True),
            model.register_forward_hook(_Hook(self._leave_model), always_call=True),
        ]
        for layer in layers.values():
            before, after = _Hook(partial(self._before, layer)), _Hook(partial(self._after, layer))
            self._hooks += [
                layer.module.register_forward_pre_hook(before, with_kwargs=True),
                layer.module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True),
            ]

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the layers that are reweighted now; "" is the model itself.

        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> handle = persample.reweight(model, lambda layer, grads: None)
        >>> handle.layers
        ('0', '2')
        """
        return tuple(path for path, layer in self._layers.items() if layer.why_plain() is None)

    def explain(self) -> dict[str, str]:
        """Returns for each linear and convolution layer what happens to its gradient, and why.

        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> handle = persample.reweight(model, lambda layer, grads: None)
        >>> model(torch.randn(5, 3)).sum().backward()
        >>> handle.explain()["2"]
        'reweighted, samples on axis 0 of its output'
        """
        return {path: self._explain(layer) for path, layer in self._layers.items()}

    @staticmethod
    def _explain(layer: _Layer) -> str:
        plain = layer.why_plain()
        if plain is not None:
            return f"plain: {plain}"
        if not layer.called:
            return "plain so far: its forward has not been called (another module may use its weight)"
        return "reweighted" + ("" if layer.axis is None else f", samples on axis {layer.axis} of its output")

    def remove(self) -> None:
        """Restores the ordinary backward pass (graphs built before stay as they are); may be repeated.

        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> handle = persample.reweight(model, lambda layer, grads: None)
        >>> handle.remove()
        >>> model[0]._forward_hooks
        OrderedDict()
        """
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers.values():
            layer.switch_on()
        self._hooks = []

    def __enter__(self) -> Reweighting:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def output_grad(self) -> Tensor | None:
        """While a policy runs, with `outputs=True`: the gradient at the output of the model, in that forward pass.

        >>> model, seen = nn.Linear(3, 1), []
        >>> def policy(layer, grads):
        ...     seen.append(handle.output_grad)
        >>> handle = persample.reweight(model, policy, outputs=True)
        >>> model(torch.randn(2, 3)).sum().backward()
        >>> seen
        [tensor([[1.],
                [1.]])]
        """
        return None if self._asked is None else self._asked[0].output_grad

    def joined(self, gather: Callable[[Tensor, int], Tensor]) -> dict[str, LayerGrads]:
        """Returns, while a policy runs, the gradients it is asked about on a larger batch, by layer path.

        gather(tensor, axis) is called with the x and the z of every use of every layer, in the same order in
        every process, and returns them with more samples along `axis`: its own and those of other processes.

        >>> model, seen = nn.Linear(3, 1), []
        >>> def policy(layer, grads):
        ...     twice = handle.joined(lambda tensor, axis: torch.cat([tensor, tensor], axis))  # a second process
        ...     seen.append(twice[layer].batch_size)
        >>> handle = persample.reweight(model, policy)
        >>> model(torch.randn(2, 3)).sum().backward()
        >>> seen
        [4]
        """
        if self._asked is None:
            raise ValueError("joined(gather) is for policies; no backward pass is asking one now")
        return {
            path: layer_grads(module, [(gather(x, axis), gather(z, axis)) for x, z in found], needed, axis)
            for path, (module, found, needed, axis) in self._asked[1].items()
        }

    def _gradients(self, group: list[_Uses], needed: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of [weight, bias] of each layer of the group, after asking the policy."""
        met: list[tuple[int, _Layer]] = []
        parts: dict[str, tuple] = {}
        for number, uses in enumerate(group):
            if uses.found:
                layer, wanted = uses.layer, needed[2 * number : 2 * number + 2]
                met.append((number, layer))
                parts[layer.path] = (layer.module, layer.check(uses), wanted, layer.axis)
        grads = {path: layer_grads(*part) for path, part in parts.items()}
        self._asked = group[0].forward, parts
        try:
            if self._joint:
                answers = self._policy(grads)
            else:
                answers = {path: self._policy(path, each) for path, each in grads.items()}
        finally:
            self._asked = None
        result: list[Tensor | None] = [None] * (2 * len(group))
        for number, layer in met:
            result[2 * number : 2 * number + 2] = layer.combine(grads[layer.path], answers.get(layer.path))
        return result

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim())
        first = next(tensors, None)
        self._forward = _Pass(None if first is None else first.shape[0])
        self._gates = self._joint_gates() if self._joint and torch.is_grad_enabled() else {}

    def _joint_gates(self) -> dict[str, tuple[Tensor, _Uses]]:
        """One Gate for all layers: it runs when the last of their Taps has run."""
        layers = [layer for layer in self._layers.values() if layer.parameters()]
        group = [_Uses(layer, self._forward) for layer in layers]
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        if any(hasattr(parameter, "to_local") for parameter in parameters):
            raise ValueError("joint=True needs whole weights, but these are sharded (FSDP); ask layer by layer")
        if not group:
            return {}
        token = _Gate.apply(self, group, *parameters)
        return {uses.layer.path: (token, uses) for uses in group}

    def _leave_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        # From here on a layer runs on its own: in a checkpoint's recomputation, or called directly.
        self._gates = None
        if self._outputs:
            leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.dim())
            first = next(leaves, None)
            if first is not None and first.requires_grad:
                first.register_hook(partial(_keep_output_grad, self._forward))

    def _before(self, layer: _Layer, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # torch.func differentiates what it is given, and tensors inside it cannot be switched.
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            layer.switch_off()

    def _after(self, layer: _Layer, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
        if not layer.off:
            return None
        layer.switch_on()
        if not isinstance(output, Tensor):  # the forward raised
            return None
        layer.called = True
        token, uses = self._gate(layer)
        return _Tap.apply(output, args[0] if args else kwargs["input"], token, uses)

    def _gate(self, layer: _Layer) -> tuple[Tensor, _Uses]:
        if self._gates is not None and layer.path in self._gates:
            return self._gates[layer.path]
        uses = _Uses(layer, self._forward)
        token = _Gate.apply(self, [uses], *layer.parameters())
        if self._gates is not None:
            self._gates[layer.path] = token, uses
        return token, uses


def _keep_output_grad(forward: _Pass, grad: Tensor) -> None:
    forward.output_grad = grad.detach()


def reweight(
    model: nn.Module,
    policy: Policy,
    *,
    batch_axis: int | Mapping[str, int] | None = None,
    joint: bool = False,
    outputs: bool = False,
) -> Reweighting:
    """Returns a handle; until its `remove()`, backward passes accumulate Σ_b c_b g_b in the layers of
    `model`.

    For every `nn.Linear`, `nn.Conv1d`–`3d` and `nn.ConvTranspose1d`–`3d` that runs, weight and bias together,

        grad = Σ_b c_b g_b,    c = policy(layer path, grads),

    with g_b sample b's share of the gradient of the loss on which `backward()` is called (the form of
    equation 9 of the FNGD paper). All other parameters get the plain gradient Σ_b g_b. With given c it
    costs one elementwise product per layer beyond an ordinary backward pass.

    Arguments:
        policy: called once for each layer in each backward pass, with the layer's path and its `LayerGrads`.
            Returns None (the plain gradient), c of shape [B] (all ones is the plain gradient too), or the
            gradients of (weight, bias) themselves, where it has formed them anyway.
        batch_axis: which axis of a layer's output counts samples; an int for all linear layers, or a dict by
            layer path. By default it is found in the first backward pass: the axis that is as long as axis 0
            of the first tensor given to the model. In a convolution it is axis 0; giving {path: 0} makes
            each row a sample, whatever their number.
        joint: ask the policy once for all layers, when the backward pass has met the last of them: it gets a
            dict of `LayerGrads` by path and returns a dict of answers (a path left out: the plain gradient).
            Until then x and z of every layer are kept: the backward pass frees no activations on the way.
        outputs: keep the gradient at the model's output for the policy, as `output_grad` of the handle. The
            output is what the model's own forward returns, or its first tensor with an axis.

    Raises:
        ValueError: the model is reweighted already, or `batch_axis` names no layer or an impossible axis.
            In the backward pass: the batch axis is uncertain, or the policy returned neither None nor [B].

    Where modules couple samples (BatchNorm in training mode), g_b is what flows through sample b's rows, as
    in the paper; these still add up to the batch gradient. Layers with a frozen or parametrised weight,
    subclasses with their own forward, and weights used without calling their layer keep the plain
    gradient: see `explain()`. Second derivatives (create_graph=True) are refused by autograd.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> clip = lambda layer, grads: 1 / grads.norms().clamp(min=1)  # each sample, layer by layer
    >>> with reweight(model, clip):
    ...     model(torch.randn(5, 3)).sum().backward()
    """
    for path, module in model.named_modules():
        hooks = itertools.chain(module._forward_pre_hooks.values(), module._forward_hooks.values())
        if any(isinstance(hook, _Hook) for hook in hooks):
            where = f"its module '{path}'" if path else "it"
            raise ValueError(
                f"this model is reweighted already ({where} carries hooks of persample.reweight). Call "
                "remove() on the earlier handle, or on the optimiser that made it, first."
            )
    modules = dict(_layers(model))
    axes = _axes(modules, batch_axis)
    layers = {path: _Layer(path, module, axes.get(path)) for path, module in modules.items()}
    return Reweighting(model, policy, layers, joint=joint, outputs=outputs)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, LAYERS) and any(type(module).forward is kind.forward for kind in LAYERS):
            yield path, module


def _axes(modules: Mapping[str, nn.Module], batch_axis: int | Mapping[str, int] | None) -> dict[str, int]:
    if batch_axis is None:
        return {}
    if isinstance(batch_axis, int):
        if batch_axis < 0:
            raise ValueError(f"batch_axis={batch_axis}: count axes from the front, 0, 1, …")
        able = [path for path, module in modules.items() if isinstance(module, nn.Linear) or not batch_axis]
        return dict.fromkeys(able, batch_axis)
    unknown = sorted(set(batch_axis) - set(modules))
    if unknown:
        raise ValueError(f"batch_axis names {unknown}, but the layers that can be named are {sorted(modules)}.")
    for path, axis in batch_axis.items():
        if axis < 0 or (axis and not isinstance(modules[path], nn.Linear)):
            raise ValueError(
                f"batch_axis={{'{path}': {axis}}}: axes count from the front, and a convolution has its "
                "samples on axis 0."
            )
    return dict(batch_axis)
