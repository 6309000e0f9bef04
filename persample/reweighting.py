"""The handle of `persample.reweight`: its hooks, and what they do in a forward and in a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from persample import compiled, trial
from persample.compiled import Target
from persample.functional import Watcher, base_of, owners
from persample.layers import LayerGrads, layer_grads
from persample.taps import Gate, Pass, Tap, Uses
from persample.weights import Layer

Policy = Callable[..., Any]
"""(layer path, LayerGrads) → factors [B], a pair of gradients or None; jointly, one dict by path → another."""


class _Inert:
    """What a copied or unpickled hook becomes: it does nothing."""

    def __call__(self, *_: Any, **__: Any) -> None:
        return None


class Hook:
    """A hook whose copies are inert, so that copying or saving a model takes no optimiser along.

    `traced` is what torch.compile is to see instead; without it the hook is a break in the graph. For Dynamo
    would take the parameters for constants that need no gradient, and lose it: it may not look inside.
    """

    def __init__(self, function: Callable[..., Any], traced: Callable[..., Any] | None = None) -> None:
        self.function = function
        self.traced = torch.compiler.disable(function) if traced is None else traced

    def __call__(self, *args: Any) -> Any:
        return self.traced(*args) if torch.compiler.is_dynamo_compiling() else self.function(*args)

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
        self,
        model: nn.Module,
        policy: Policy,
        layers: dict[str, Layer],
        tied: dict[str, str],
        axis_of: Callable[[str], int | None],
        weights: dict[nn.Parameter, str],
        *,
        joint: bool,
        outputs: bool,
    ) -> None:
        self._model, self._layers, self._tied, self._policy = model, layers, tied, policy
        self._axis_of, self._joint, self._outputs = axis_of, joint, outputs
        self._forward = Pass()
        self._asked: tuple[Pass, dict[str, tuple]] | None = None  # while the policy runs
        self._gates: dict[str, tuple[Tensor, Uses]] | None = None
        self._running: Layer | None = None
        self._unsure: dict[Layer, list[int]] = {}
        self._trial: dict[Any, list[Tensor]] | None = None  # while the model is tried out
        self._call: tuple[tuple, dict] = (), {}
        self._met = False  # whether a forward pass for training has been seen
        self._watcher = Watcher(weights, self._linear)
        self._watched = list(self._watcher.names)
        self._entered: list[list[nn.Parameter]] = []
        self._root = Target(self)
        self._targets = {path: Target(self, layer) for path, layer in layers.items()}
        self._hooks = list(self._register())

    def _register(self) -> Iterator[RemovableHandle]:
        # The root's hook first: the model may be a layer itself.
        model = self._model
        yield model.register_forward_pre_hook(Hook(self._enter_model, self._enter_traced), with_kwargs=True)
        yield model.register_forward_hook(Hook(self._leave_model, self._leave_traced), always_call=True)
        modules = {path: self._layers[path] for path in self._layers}
        modules |= {path: self._layers[first] for path, first in self._tied.items()}
        for path, layer in modules.items():
            module, number = model.get_submodule(path), self._targets[layer.path].number
            before = Hook(partial(self._before, layer), partial(self._before_traced, layer, number))
            after = Hook(partial(self._after, layer), partial(self._after_traced, layer, number))
            yield module.register_forward_pre_hook(before, with_kwargs=True)
            yield module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True)
        for module, weights in owners(model, self._watcher.names):
            # A checkpoint runs a module again in the backward pass, without the model around it.
            yield module.register_forward_pre_hook(Hook(partial(self._enter_owner, weights)), with_kwargs=True)
            yield module.register_forward_hook(Hook(self._leave_owner), always_call=True)

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

        A weight that functions use is known from the first forward pass on, under the parameter's name.

        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> handle = persample.reweight(model, lambda layer, grads: None)
        >>> model(torch.randn(5, 3)).sum().backward()
        >>> handle.explain()["2"]
        'reweighted, samples on axis 0 of its output'
        """
        result = {path: layer.explain() for path, layer in self._layers.items()}
        for path, first in self._tied.items():
            result[path] = f"{self._layers[first].explain()}; one layer with '{first}'"
        owned = {id(weight) for layer in self._layers.values() for weight in layer.members()}
        for parameter, name in self._watcher.names.items():
            function = self._watcher.other.get(name)
            if function not in (None, "embedding", "embedding_bag") and id(parameter) not in owned:
                result[name] = f"plain: it was given to '{function}', and only F.linear is reweighted"
        return result

    def parameters(self, path: str) -> list[Tensor]:
        """Returns the parameters that a layer's gradient belongs to, by a path of `explain()`; weight first.

        Raises KeyError if there is no such path.

        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> handle = persample.reweight(model, lambda layer, grads: None)
        >>> [tuple(parameter.shape) for parameter in handle.parameters("2")]
        [(1, 4), (1,)]
        """
        layer = self._layers.get(self._tied.get(path, path))
        if layer is not None:
            return layer.members()
        found: list[Tensor] = [each for each, name in self._watcher.names.items() if name == path]
        if not found:
            raise KeyError(f"no layer is called '{path}'; there are {sorted(self.explain())}")
        return found

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
        self._watcher.stop(list(self._watcher.names))
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

    # --- in the backward pass -------------------------------------------------------------------------------

    def _gradients(self, group: list[Uses], needed: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of [weight, bias] of each layer of the group, after asking the policy."""
        met: list[tuple[int, Layer]] = []
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

    # --- in the forward pass --------------------------------------------------------------------------------

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._trial is not None:
            return
        self._forward, self._running, self._unsure = Pass(_batch(args, kwargs)), None, {}
        while self._entered:  # left over from a forward pass that Ctrl-C ended
            self._watcher.stop(self._entered.pop())
        self._gates = {}
        if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return
        if self._joint:
            if not self._met and self._watched:  # the Gate must know every layer beforehand
                with trial.rehearsal(self._model):
                    self._rehearse(args, kwargs)
            self._gates = self._joint_gates()
        self._call = args, kwargs
        self._enter_owner(self._watched, module, args, kwargs)

    def _joint_gates(self) -> dict[str, tuple[Tensor, Uses]]:
        """One Gate for all layers: it runs when the last of their Taps has run."""
        layers = [layer for layer in self._layers.values() if layer.parameters()]
        group = [Uses(layer, self._forward) for layer in layers]
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        if any(hasattr(parameter, "to_local") for parameter in parameters):
            raise ValueError("joint=True needs whole weights, but these are sharded (FSDP); ask layer by layer")
        if not group:
            return {}
        token = Gate.apply(self._gradients, group, *parameters)
        return {uses.layer.path: (token, uses) for uses in group}

    def _leave_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._trial is not None:
            return
        # From here on a layer runs on its own: in a checkpoint's recomputation, or called directly.
        self._gates = None
        (args, kwargs), self._call = self._call, ((), {})
        self._leave_owner(module, args, output)
        if output is None:  # the forward raised
            return
        if self._unsure and self._forward.batch is not None:
            found = trial.batch_axes(self._model, self._rehearse, args, kwargs, self._unsure, self._forward.batch)
            for layer, axis in found.items():
                layer.axis = axis
            self._unsure = {}
        if torch.is_grad_enabled() and not self._met:
            self._met = True
            called = {id(weight) for layer in self._layers.values() if layer.called for weight in layer.members()}
            functional = {
                id(weight) for layer in self._layers.values() if layer.module is None for weight in layer.owners
            }
            self._watched = [each for each in self._watched if id(each) not in called or id(each) in functional]
        if self._outputs:
            first = _first_tensor(output)
            if first is not None and first.requires_grad:
                first.register_hook(partial(_keep_output_grad, self._forward))

    def _before(self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._running = layer
        # torch.func differentiates what it is given, and tensors inside it cannot be switched.
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            layer.switch_off()

    def _after(self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
        self._running = None
        if self._trial is not None:
            self._trial.setdefault(layer, []).append(output)
        if not layer.off:
            return None
        layer.switch_on()
        if not isinstance(output, Tensor):  # the forward raised
            return None
        return self._tapped(layer, args[0] if args else kwargs["input"], output)

    def _tapped(self, layer: Layer, x: Tensor, output: Tensor) -> Tensor:
        layer.called = True
        if layer.axis is None and self._forward.batch is not None:
            axes = layer.candidates(tuple(output.shape), self._forward.batch)
            if len(axes) > 1:
                self._unsure[layer] = axes
        token, uses = self._gate(layer)
        return Tap.apply(output, x, token, uses)

    def _gate(self, layer: Layer) -> tuple[Tensor, Uses]:
        if self._gates is not None and layer.path in self._gates:
            return self._gates[layer.path]
        uses = Uses(layer, self._forward)
        token = Gate.apply(self._gradients, [uses], *layer.parameters())
        if self._gates is not None:
            self._gates[layer.path] = token, uses
        return token, uses

    # --- functions ------------------------------------------------------------------------------------------

    def _enter_owner(self, weights: list[nn.Parameter], module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._entered.append(self._watcher.start(weights) if torch.is_grad_enabled() or self._trial is not None else [])

    def _leave_owner(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._entered:
            self._watcher.stop(self._entered.pop())

    def _rehearse(self, args: tuple, kwargs: dict) -> dict[Any, list[Tensor]]:
        """Runs the model; outputs by layer."""
        self._trial = {}
        try:
            with self._watcher.watching(self._watched):
                self._model(*args, **kwargs)
            return self._trial
        finally:
            self._trial = None

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, name: str, axis: int | None) -> Tensor:
        """F.linear of a watched weight."""
        training = torch.is_grad_enabled() or self._trial is not None
        if self._running is not None or not (training and weight.requires_grad):
            return F.linear(x, weight, bias)
        layer = self._function(name, weight, bias)
        batch = self._forward.batch
        if layer.axis is None and axis is not None and batch is not None and x.shape[axis] == batch:
            layer.axis = axis
        if self._trial is not None:
            output = F.linear(x, weight, bias)
            self._trial.setdefault(layer, []).append(output)
            return output
        layer.source = lambda: (weight, bias)
        return self._tapped(layer, x, F.linear(x, weight.detach(), None if bias is None else bias.detach()))

    def _function(self, name: str, weight: Tensor, bias: Tensor | None) -> Layer:
        """The layer of a function's weight and bias; a weight with several biases is several layers."""
        owners = tuple(base_of(each) for each in (weight, bias) if each is not None)
        for number in count(1):
            path = name if number == 1 else f"{name} ({number})"
            layer = self._layers.get(path)
            if layer is None:
                layer = self._layers[path] = Layer(path, None, self._axis_of(name), owners=owners)
                layer.source = lambda: (weight, bias)
            if layer.module is None and [id(each) for each in layer.owners] == [id(each) for each in owners]:
                return layer
        raise AssertionError("count never ends")

    # --- under torch.compile --------------------------------------------------------------------------------

    def _enter_traced(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._joint:
            _outside(self._enter_model, module, args, kwargs)
            return
        compiled.begin(self._root.number)
        self._forward = Pass(_batch(args, kwargs))
        self._gates = {}

    def _leave_traced(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._joint or (self._outputs and not isinstance(output, Tensor)):
            return _outside(self._leave_model, module, args, output)
        self._gates = None
        if self._outputs and torch.is_grad_enabled():
            return compiled.watched_output(output, self._root.number)
        return None

    def _before_traced(self, layer: Layer, number: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if (
            torch.is_grad_enabled()
            and compiled.trainable(module)
            and not self._in_graph(layer, number, module, args, kwargs)
        ):
            _outside(self._before, layer, module, args, kwargs)

    def _in_graph(self, layer: Layer, number: int, module: nn.Module, args: tuple, kwargs: dict) -> bool:
        if self._joint or layer.opaque or self._forward.batch is None or not compiled.traceable(module, args, kwargs):
            return False
        return compiled.claim(self._root.number, number)

    def _after_traced(
        self, layer: Layer, number: int, module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if layer.off:
            return _outside(self._after, layer, module, args, kwargs, output)
        if not compiled.trainable(module):
            return None
        layer.called = True
        x = args[0] if args else kwargs["input"]
        batch = self._forward.batch
        assert batch is not None, "_in_graph has checked"
        return compiled.call(module, x, batch, number)


@torch.compiler.disable(
    reason="persample.reweight puts a layer into a compiled graph only if it is called once in a forward pass, in the "
    "graph that the model's forward begins in, with zero padding, and without joint=True"
)
def _outside(function: Callable[..., Any], *args: Any) -> Any:
    """Calls the function as it is: a break in a compiled graph."""
    return function(*args)


def _first_tensor(tree: Any) -> Tensor | None:
    return next((leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.dim()), None)


def _batch(args: tuple, kwargs: dict) -> int | None:
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    return None


def _keep_output_grad(forward: Pass, grad: Tensor) -> None:
    forward.output_grad = grad.detach()
