"""Weights that a function is given, where no module's call tells: `x @ self.weight`, `nn.MultiheadAttention`.

While a forward pass runs, such parameters are of a class of their own, `Watched`, and so are views of them, which see
every function that is called with them (`__torch_function__`) and do what the function does. Functions that are linear
(`persample.reweighting.functions.linear_calls`) hand their call to the watcher, and `F.multi_head_attention_forward`,
which has its linear layers inside, runs torch's own code with a linear function of ours in place of `F.linear`.
Anything else that is done with a weight leaves it the plain gradient.

The parameter stays the same object with the same memory; only its class changes, for the time of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from persample.reweighting.functions.linear_calls import Call, read
from persample.reweighting.layer_grads import LAYERS
from persample.reweighting.slices import Part, part_of

Function = Callable[[Call, str, "int | None"], Tensor]
"""(what is called, the weight's name, the batch axis if known) → the output before `back`."""

_ATTENTION = ("_in_projection_packed", "_in_projection", "multi_head_attention_forward")


class Watched(nn.Parameter):
    """The class of a parameter while it is watched."""

    watcher: Watcher

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Does what `func` does; linear functions go to the watcher."""
        return _called(func, args, kwargs or {})


class WatchedView(Tensor):
    """The class of a view of such a parameter."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Does what `func` does; linear functions go to the watcher."""
        return _called(func, args, kwargs or {})


class Watcher:
    """Watches the parameters of a model that no layer's module owns, while one of its forward passes runs."""

    def __init__(self, names: dict[nn.Parameter, str], function: Function) -> None:
        self.names, self.function = names, function
        self.other: dict[str, str] = {}
        """Name of a parameter → a function that it was given to, and not as the weight of a linear one."""
        self._views: list[ref[Tensor]] = []

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

    def follow(self, view: Tensor) -> None:
        """From now on a view of a watched parameter is watched, too."""
        view.__class__ = WatchedView
        self._views.append(ref(view))

    def stop(self, parameters: list[nn.Parameter]) -> None:
        """Makes the parameters ordinary ones again, and all views ordinary tensors."""
        for view in (each() for each in self._views):
            if view is not None:
                view.__class__ = Tensor
        self._views.clear()
        for each in parameters:
            if type(each) is Watched:
                del each.watcher
                each.__class__ = nn.Parameter  # type: ignore[assignment]


def watchable(model: nn.Module) -> dict[nn.Parameter, str]:
    """The parameters that may be the weight of a linear function, with their names.

    Matrices and kernels of convolutions, whoever owns them: the weight of an `nn.Linear` may be used without calling
    it. Those of an attention's output projection, which is never called, go by the projection's path. What has more
    axes and one entry on the first (positions, a token for the class) is taken for no kernel.
    """
    inside = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    found: dict[nn.Parameter, str] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                continue
            if parameter.dim() == 2 or (2 < parameter.dim() < 6 and len(parameter) > 1):
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
def _called(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        if not torch._C._are_functorch_transforms_active():
            if func is F.multi_head_attention_forward:
                return _attention(*args, **kwargs)
            call = read(func, _is_weight, args, kwargs)
            output = None if call is None else _tapped(call, None)
            if call is not None and output is not None:
                return call.back(output)
        result = func(*args, **kwargs)
        _note(func, args, kwargs, result)
        return result


def _is_weight(operand: Any) -> bool:
    return isinstance(operand, Tensor) and isinstance(base_of(operand), Watched)


def _note(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
    """Notes what else a weight is used for; views of it are watched in its place."""
    results = [result] if isinstance(result, Tensor) else result if isinstance(result, tuple | list) else []
    results = [each for each in results if isinstance(each, Tensor) and each.requires_grad]
    views = [each for each in results if type(each) is Tensor and _is_weight(each)]
    for view in views:
        base_of(view).watcher.follow(view)  # type: ignore[attr-defined]
    if len(views) == len(results):
        return
    name = getattr(func, "__name__", str(func))
    for each in tree_leaves((args, kwargs)):
        if _is_weight(each):
            watcher = base_of(each).watcher  # type: ignore[attr-defined]
            own = getattr(func.__self__, "__name__", name) if name == "__get__" else name
            watcher.other[watcher.names[base_of(each)]] = own


def _tapped(call: Call, axis: int | None) -> Tensor | None:
    """The output before `back`; None where the weight is no rows of a parameter."""
    owner = base_of(call.weight)
    part = part_of(call.weight, owner) if isinstance(owner, Watched) else None
    if part is None or (not part.whole and getattr(call.geometry, "transposed", False)):
        return None
    return owner.watcher.function(call, owner.watcher.names[owner] + _rows(part), axis)  # type: ignore[attr-defined]


def _rows(part: Part) -> str:
    """Rows of it: the projections of queries, keys and values are one parameter."""
    if part.whole:
        return ""
    return f"[{':, ' * part.axis}{part.start}:{part.stop}]"


def _attention(query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """torch's function, [T, B, E] → [T, B, E], with its linear layers watched."""
    time_batch = query.shape[:2] if query.dim() == 3 else None

    def tapped(x: Tensor, weight: Tensor, bias: Tensor | None, axis: int | None) -> Tensor:
        output = _tapped(Call(x, weight, bias), axis)
        return F.linear(x, weight, bias) if output is None else output

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if time_batch is None:
            return tapped(x, weight, bias, None)
        if x.dim() == 2:  # the output projection sees both axes as one
            return tapped(x.unflatten(0, time_batch), weight, bias, 1).flatten(0, 1)
        return tapped(x, weight, bias, 1)

    namespace = {**vars(F), "linear": linear, "has_torch_function": lambda tensors: False}
    for name in _ATTENTION:
        code = getattr(F, name)
        namespace[name] = FunctionType(code.__code__, namespace, name, code.__defaults__, code.__closure__)
        namespace[name].__kwdefaults__ = code.__kwdefaults__
    return namespace["multi_head_attention_forward"](query, *args, **kwargs)
