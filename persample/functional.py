"""Weights that a function is given, where no module's call tells: `F.linear(x, self.weight)`, `nn.MultiheadAttention`.

While a forward pass runs, such parameters are of a class of their own, `Watched`, which sees every function that is
called with them (`__torch_function__`) and does what the function does. Two functions are special: `F.linear` hands
its call to the watcher, and `F.multi_head_attention_forward`, which has its linear layers inside, runs torch's own
code with that `F.linear` in its place. Anything else that is done with a weight leaves it the plain gradient.

The parameter stays the same object with the same memory; only its class changes, for the time of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from persample.layers import LAYERS

Linear = Callable[[Tensor, Tensor, Tensor | None, str, "int | None"], Tensor]
"""(x, weight, bias, name, batch axis if known) → output."""

_ATTENTION = ("_in_projection_packed", "_in_projection", "multi_head_attention_forward")


class Watched(nn.Parameter):
    """The class of a parameter while it is watched."""

    watcher: Watcher

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Does what `func` does; linear functions go to the watcher."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if not torch._C._are_functorch_transforms_active():
                if func is F.linear:
                    return _linear(*args, **kwargs)
                if func is F.multi_head_attention_forward:
                    return _attention(*args, **kwargs)
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and result.requires_grad:
                name = getattr(func, "__name__", str(func))
                for each in (*args, *kwargs.values()):
                    if isinstance(each, Watched):
                        each.watcher.other[each.watcher.names[each]] = (
                            getattr(func.__self__, "__name__", name) if name == "__get__" else name
                        )
            return result


class Watcher:
    """Watches the parameters of a model that no layer's module owns, while one of its forward passes runs."""

    def __init__(self, names: dict[nn.Parameter, str], linear: Linear) -> None:
        self.names, self.linear = names, linear
        self.other: dict[str, str] = {}
        """Name of a parameter → a function other than F.linear that it was given to."""

    @contextmanager
    def watching(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Within the context the parameters are watched."""
        changed = self.start(parameters)
        try:
            yield
        finally:
            self.stop(changed)

    def start(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Returns the parameters that are watched from now on, and were not before."""
        changed = [each for each in parameters if type(each) is nn.Parameter]
        for each in changed:
            each.__class__ = Watched
            each.watcher = self  # type: ignore[attr-defined]
        return changed

    @staticmethod
    def stop(parameters: list[nn.Parameter]) -> None:
        """Makes the parameters ordinary ones again."""
        for each in parameters:
            if type(each) is Watched:
                del each.watcher
                each.__class__ = nn.Parameter  # type: ignore[assignment]


def watchable(model: nn.Module) -> dict[nn.Parameter, str]:
    """The parameters that may be the weight of a linear function, with their names.

    Matrices, whoever owns them: the weight of an `nn.Linear` may be used without calling it. Those of an attention's
    output projection, which is never called, go by the projection's path.
    """
    inside = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    found: dict[nn.Parameter, str] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if type(parameter) is nn.Parameter and parameter.dim() == 2 and parameter.is_floating_point():
                own = f"{path}.{name}" if path else name
                found.setdefault(parameter, path if id(module) in inside else own)
    return found


def owners(model: nn.Module, names: dict[nn.Parameter, str]) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules that may use such weights as functions themselves, each with those weights."""
    for module in model.modules():
        weights = [each for each in module._parameters.values() if each in names]
        if isinstance(module, nn.MultiheadAttention):
            weights += [each for each in module.out_proj._parameters.values() if each in names]
        if weights and not isinstance(module, (*LAYERS, nn.Embedding, nn.EmbeddingBag)):
            yield module, weights


def base_of(weight: Tensor) -> Tensor:
    """The tensor that `weight` is a view of, or itself."""
    return weight if weight._base is None else weight._base


@torch.compiler.disable(reason="persample.reweight watches this weight; only calls of layers join a compiled graph")
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _tapped(input, weight, bias, None)


def _tapped(x: Tensor, weight: Tensor, bias: Tensor | None, axis: int | None) -> Tensor:
    owner = base_of(weight)
    if not isinstance(owner, Watched) or not weight.is_contiguous() or weight.shape[1:] != owner.shape[1:]:
        return F.linear(x, weight, bias)
    name = owner.watcher.names[owner]
    if weight is not owner:  # rows of it: the projections of queries, keys and values are one parameter
        first = (weight.storage_offset() - owner.storage_offset()) // owner.shape[1]
        name += f"[{first}:{first + len(weight)}]"
    return owner.watcher.linear(x, weight, bias, name, axis)


@torch.compiler.disable(reason="persample.reweight watches this attention; only calls of layers join a compiled graph")
def _attention(query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """torch's function, [T, B, E] → [T, B, E], with its linear layers watched."""
    time_batch = query.shape[:2] if query.dim() == 3 else None

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if time_batch is None:
            return _tapped(x, weight, bias, None)
        if x.dim() == 2:  # the output projection sees both axes as one
            return _tapped(x.unflatten(0, time_batch), weight, bias, 1).flatten(0, 1)
        return _tapped(x, weight, bias, 1)

    namespace = {**vars(F), "linear": linear, "has_torch_function": lambda tensors: False}
    for name in _ATTENTION:
        code = getattr(F, name)
        namespace[name] = FunctionType(code.__code__, namespace, name, code.__defaults__, code.__closure__)
        namespace[name].__kwdefaults__ = code.__kwdefaults__
    return namespace["multi_head_attention_forward"](query, *args, **kwargs)
