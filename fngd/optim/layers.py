"""Which parameters the layers of `persample.reweight` are made of, or which rows of them.

A module's weight and bias are parameters. A function's may be rows of them: attention keeps the projections of queries,
keys and values in one parameter, and where these have different inputs they are two or three layers. So whatever is
done to a layer's gradient is done to rows of `.grad`.

Functions are known from the first forward pass on, the parameters of attention from the beginning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fngd.optim.distributed import Exchange
from persample.reweighting import Part, Parts, Reweighting

__all__ = [
    "Members", "Part", "attention_parameters", "by_parameter", "covered", "elsewhere", "members", "parameter_of",
    "parameters", "scaled_rows", "unseen",
]  # fmt: skip


Members = Parts


def members(handle: Reweighting, path: str) -> Members:
    """Returns where the weight and the bias of a layer are, as `handle.parts(path)` does.

    (None, None) for a path that is no layer (yet), and for a function whose bias is no parameter and no rows of one.
    """
    try:
        return handle.parts(path)
    except KeyError:
        return None, None


def parameters(handle: Reweighting, path: str) -> list[Tensor]:
    """Returns the parameters, weight first, that a layer consists of; rows stand for the whole.

    >>> model = nn.Linear(3, 1)
    >>> [tuple(each.shape) for each in parameters(persample.reweight(model, lambda layer, grads: None), "")]
    [(1, 3), (1,)]
    """
    return [part.param for part in members(handle, path) if part is not None]


def attention_parameters(model: nn.Module) -> Iterator[Tensor]:
    """The weights and biases that an attention's forward will use as linear functions."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            named = [(name, each) for name, each in module._parameters.items() if "proj" in name]
            yield from (each for _, each in named if each is not None)
            yield from (each for each in module.out_proj._parameters.values() if each is not None)


def parameter_of(model: nn.Module, path: str) -> Tensor | None:
    """Returns the weight that a path names, before its function has been called; None where the model has none.

    >>> model = nn.MultiheadAttention(4, 2)
    >>> parameter_of(model, "in_proj_weight[0:4]") is model.in_proj_weight
    True
    """
    name = path.split(" (")[0].split("[")[0]
    owner, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
        found = module._parameters.get(last)
        return model.get_submodule(name)._parameters.get("weight") if found is None else found
    except AttributeError:
        return None


def unseen(model: nn.Module, known: Collection[str], *, functions: bool) -> dict[str, str]:
    """Returns for projections of attention that no handle speaks of why they take the plain gradient, by path."""
    result = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        own = {name: each for name, each in module._parameters.items() if name.endswith("proj_weight")}
        for name, weight in {**own, "out_proj": module.out_proj._parameters.get("weight")}.items():
            full = f"{path}.{name}" if path else name
            if weight is None or any(each.split(" (")[0].split("[")[0] == full for each in known):
                continue
            if not functions:
                reason = "plain: functions=False"
            elif hasattr(weight, "to_local"):
                reason = "plain: it is sharded (FSDP), and a function's weight has to be whole"
            elif not weight.requires_grad:
                reason = "plain: its weight is frozen"
            else:
                reason = "plain so far: its function has not been called"
            result[full] = reason
    return result


def scaled_rows(grad: Tensor, parts: Iterable[Part], factor: Tensor) -> Tensor:
    """Returns a parameter's gradient with these rows of it, each once, multiplied by a number.

    >>> parameter = nn.Parameter(torch.zeros(3))
    >>> scaled_rows(torch.ones(3), [Part(parameter, 0, 2), Part(parameter, 1, 2)], torch.tensor(0.5))
    tensor([0.5000, 0.5000, 1.0000])
    """
    listed = list(parts)
    if any(part.whole for part in listed):
        return _times(grad, factor)
    return torch.where(covered(listed), grad * factor, grad)


def by_parameter(layers: Iterable[Members]) -> dict[Tensor, list[Part]]:
    """Returns for each parameter of several layers the parts that are theirs."""
    found: dict[Tensor, list[Part]] = {}
    for layer in layers:
        for part in layer:
            if part is not None:
                found.setdefault(part.param, []).append(part)
    return found


def elsewhere(
    exchange: Exchange, groups: Iterable[dict[str, Any]], handle: Reweighting, layers: Iterable[str]
) -> list[Members]:
    """Returns the rows of parameters that layers of other processes are made of, and none of these `layers`."""
    params = [param for group in groups for param in group["params"]]
    numbers = {id(param): number for number, param in enumerate(params)}
    places = [part for layer in layers for part in members(handle, layer) if part is not None]
    own = sorted((numbers[id(part.param)], part.start, part.stop) for part in places if id(part.param) in numbers)
    return [(Part(params[number], start, stop), None) for number, start, stop in exchange.others(own)]


def covered(parts: Iterable[Part]) -> Tensor:
    """Returns for each entry of a parameter whether it is in one of the parts; axes of one entry stand for all."""
    listed = list(parts)
    param = listed[0].param
    if any(part.axis for part in listed):
        entries = torch.zeros(param.shape, dtype=torch.bool, device=param.device)
    else:
        entries = torch.zeros((len(param), *(1,) * (param.dim() - 1)), dtype=torch.bool, device=param.device)
    for part in listed:
        entries.narrow(part.axis, part.start, part.stop - part.start).fill_(True)
    return entries


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    """grad·factor; a sharded tensor (FSDP) multiplies only with its like, so there each process scales its part."""
    if not hasattr(grad, "to_local"):
        return grad * factor
    local, placing = grad.to_local() * factor, (grad.device_mesh, grad.placements)  # type: ignore[attr-defined]
    return type(grad).from_local(local, *placing, shape=grad.shape, stride=grad.stride())  # type: ignore[attr-defined]
