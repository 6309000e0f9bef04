"""The handle of `persample.reweight`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from persample.reweighting.batch_axis.folded import Folded
from persample.reweighting.compile.guards import compare_hooks
from persample.reweighting.compile.hooks import TracedHooks
from persample.reweighting.functions.interception import owners
from persample.reweighting.hooks import ForwardHooks
from persample.reweighting.layer import Layer
from persample.reweighting.layer_grads import LAYERS, LayerGrads
from persample.reweighting.policy import Policy, PolicyCaller
from persample.reweighting.slices import Parts, parts_of


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
        self.function = function if traced is not None else torch.compiler.disable(function)
        self.traced = self.function if traced is None else traced

    def __call__(self, *args: Any) -> Any:
        return self.traced(*args) if torch.compiler.is_dynamo_compiling() else self.function(*args)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Inert, ()


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the linear and convolution layers of a model that can be reweighted, each with its path."""
    # Attention reads the weight of its output projection and never calls it.
    inside = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    for path, module in model.named_modules():
        own = isinstance(module, LAYERS) and any(type(module).forward is kind.forward for kind in LAYERS)
        if own and id(module) not in inside:
            yield path, module


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
        policy_caller: PolicyCaller,
        layers: dict[str, Layer],
        tied: dict[str, str],
        axis_of: Callable[[str], int | Folded | None],
        weights: dict[nn.Parameter, str],
        *,
        outputs: bool,
    ) -> None:
        self._model, self._layers, self._tied = model, layers, tied
        self._policy_caller = policy_caller
        self._eager = ForwardHooks(model, self._policy_caller, layers, axis_of, weights, outputs=outputs)
        self._watcher = self._eager.functions.watcher
        self._traced = TracedHooks(self._eager)
        self._hooks = list(self._register(model))

    def _register(self, model: nn.Module) -> Iterator[RemovableHandle]:
        compare_hooks()
        eager, traced = self._eager, self._traced
        # The root's hooks around those of the layers: the model may be a layer itself.
        # After a break in a graph Dynamo compiles what is called next, and these change more than it can follow.
        enter, leave = (torch.compiler.disable(function) for function in (eager.enter_model, eager.leave_model))
        yield model.register_forward_pre_hook(Hook(enter, traced.enter_model), with_kwargs=True)
        modules = dict(self._layers) | {path: self._layers[first] for path, first in self._tied.items()}
        for path, layer in modules.items():
            module, number = model.get_submodule(path), traced.number(layer)
            before = Hook(partial(eager.before, layer), partial(traced.before, layer, number))
            after = Hook(partial(eager.after, layer), partial(traced.after, layer, number))
            yield module.register_forward_pre_hook(before, with_kwargs=True)
            yield module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True)
        # Not sooner, with `prepend` there: up to torch 2.10 Dynamo looks hooks up in the order of registration.
        yield model.register_forward_hook(Hook(leave, traced.leave_model), always_call=True)
        for module, weights in owners(model, self._watcher.names):
            # A checkpoint runs a module again in the backward pass, without the model around it.
            yield module.register_forward_pre_hook(Hook(partial(eager.enter_owner, weights)), with_kwargs=True)
            yield module.register_forward_hook(Hook(eager.leave_owner), always_call=True)

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
        for path, _ in layers_of(self._model):
            result.setdefault(path, "plain: it was added after the model was reweighted")
        for parameter, name in self._watcher.names.items():
            function = self._watcher.other.get(name)
            if function not in (None, "embedding", "embedding_bag") and id(parameter) not in owned:
                result[name] = (
                    f"plain: it was given to '{function}', and not as the weight of a linear function of data"
                )
        return result

    def besides(self) -> dict[str, str]:
        """Returns what else uses the weight or bias of a layer, by autograd's names, as the first batch has shown.

        >>> model, table = nn.Linear(3, 5, bias=False), nn.Embedding(5, 3)
        >>> table.weight = model.weight
        >>> tied = nn.Sequential(table, model)
        >>> handle = persample.reweight(tied, lambda layer, grads: None)
        >>> tied(torch.tensor([1, 2])).sum().backward()
        >>> handle.besides()
        {'1': 'EmbeddingBackward0'}
        """
        return {path: layer.besides for path, layer in self._layers.items() if layer.besides}

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

    def parts(self, path: str) -> Parts:
        """Returns where the weight and the bias of a layer are: parameters, or rows of them
        (`persample.reweighting.slices`).

        (None, None) for a function whose bias is no parameter and no rows of one; None for a bias that there is not.
        Raises KeyError for a path of no layer, or of a function that has not been called yet.

        >>> model = nn.MultiheadAttention(4, 2)
        >>> handle = persample.reweight(model, lambda layer, grads: None, functions=True)
        >>> x, memory = torch.randn(3, 2, 4), torch.randn(5, 2, 4)
        >>> output, _ = model(x, memory, memory)  # queries are one layer, keys and values another
        >>> [(name, handle.parts(name)[0].start, handle.parts(name)[0].stop) for name in handle.functions]
        [('in_proj_weight[0:4]', 0, 4), ('in_proj_weight[4:12]', 4, 12), ('out_proj', 0, 4)]
        """
        layer = self._layers.get(self._tied.get(path, path))
        if layer is None:
            raise KeyError(f"no layer is called '{path}'; there are {sorted([*self._layers, *self._tied])}")
        return parts_of(layer)

    @property
    def functions(self) -> tuple[str, ...]:
        """Paths of the layers that are functions, as far as forward passes have met them; `parts` has an example.

        >>> handle = persample.reweight(nn.Linear(3, 1), lambda layer, grads: None, functions=True)
        >>> handle.functions
        ()
        """
        return tuple(path for path, layer in self._layers.items() if layer.module is None)

    def wrapped(self, wrap: Callable[[Policy], Policy]) -> AbstractContextManager[None]:
        """Returns a context within which wrap(policy) is asked instead of the policy: to watch it, or to time it.

        `known` is not asked then, so that every answer passes the wrapped policy. Contexts nest; each ends those that
        were entered after it.

        >>> model, seen = nn.Linear(3, 1), []
        >>> handle = persample.reweight(model, lambda layer, grads: 1 / grads.norms())
        >>> def noting(policy):
        ...     def noted(layer, grads):
        ...         factors = policy(layer, grads)
        ...         seen.append(tuple(factors.shape))
        ...         return factors
        ...     return noted
        >>> with handle.wrapped(noting):
        ...     model(torch.randn(5, 3)).sum().backward()
        >>> seen
        [(5,)]
        """
        return self._policy_caller.wrapped(wrap)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Returns a context in which forward passes are ordinary and the policy is not asked: gradients are plain.

        For gradients that are differentiated again (a gradient penalty), and passes that are none of the policy's
        business. A pass that ran inside may be differentiated outside; one that ran before takes plain gradients
        inside, which cannot be differentiated again. With activation checkpoints both belong inside. Contexts may be
        nested.

        >>> model, asked = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), []
        >>> handle = persample.reweight(model, lambda layer, grads: asked.append(layer))
        >>> x = torch.randn(5, 3, requires_grad=True)
        >>> with handle.paused():
        ...     [slope] = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        >>> slope.square().mean().backward()  # second derivatives
        >>> asked
        []
        """
        self._policy_caller.paused += 1
        try:
            yield
        finally:
            self._policy_caller.paused -= 1

    @property
    def is_paused(self) -> bool:
        """Whether a context of `paused()` is open.

        >>> handle = persample.reweight(nn.Linear(3, 1), lambda layer, grads: None)
        >>> with handle.paused():
        ...     print(handle.is_paused)
        True
        """
        return self._policy_caller.paused > 0

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

    @property
    def removed(self) -> bool:
        """Whether `remove()` has been called.

        >>> handle = persample.reweight(nn.Linear(3, 1), lambda layer, grads: None)
        >>> handle.remove()
        >>> handle.removed
        True
        """
        return not self._hooks

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
        return self._policy_caller.output_grad

    def upcoming(self) -> list[str]:
        """Returns, while a backward pass runs, the layers that it runs for their weights' gradients; with `follow=`.

        A layer is named once for each forward pass of the model. Layers in a graph of torch.compile, and those that a
        reentrant checkpoint is to run again, are not known beforehand.

        >>> model, seen = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), []
        >>> def follow(batch):
        ...     return lambda: seen.append((batch, handle.upcoming()))
        >>> handle = persample.reweight(model, lambda layer, grads: None, follow=follow)
        >>> model(torch.randn(2, 3)).sum().backward()
        >>> seen
        [(2, ['0', '2'])]
        """
        return self._policy_caller.upcoming()

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
        return self._policy_caller.joined(gather)
