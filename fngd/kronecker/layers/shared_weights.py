"""Weights that several layers share: `.grad` holds the sum of their uses, for which no Kronecker factors are kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from fngd.optim.layers import Members
from persample import LayerGrads

TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
NO_FACTORS = "it is a transposed convolution, for which no Kronecker factors are kept"


def never_preconditioned(model: nn.Module) -> dict[str, str]:
    """Returns modules that have no Kronecker factors, with the reason, by path."""
    owners = _owners(model)
    result = {}
    for path, module in model.named_modules():
        if isinstance(module, TRANSPOSED):
            result[path] = NO_FACTORS
            continue
        for name in ("bias", "weight"):
            param = module._parameters.get(name)
            if param is not None and len(owners[param]) > 1:
                result[path] = f"its {name} is shared: {', '.join(owners[param])}"
    return result


def is_transposed(grads: LayerGrads) -> bool:
    """Whether they are those of a transposed convolution."""
    return any(getattr(getattr(call, "spec", None), "transposed", False) for call in grads.calls)


def conflicts(model: nn.Module, used: Mapping[str, Members], functions: Collection[str]) -> dict[str, str]:
    """Returns functions that share a parameter, and the layers they share it with, with the reason, by path.

    Arguments:
        used: where weight and bias are, of each layer that has been called.
        functions: which of these are functions.

    >>> from fngd.optim.layers import Part
    >>> model = nn.Linear(3, 1)
    >>> part = Part(model.weight, 0, 1), None
    >>> conflicts(model, {"": part, "weight": part}, ["weight"])["weight"]
    "its weight is used by several layers: '', 'weight'"
    """
    owners = _owners(model)
    tables = {each.weight for each in model.modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag)}
    result = {}
    for path in functions:
        for name, part in zip(("weight", "bias"), used.get(path, (None, None)), strict=True):
            if part is None:
                continue
            if len(owners.get(part.param, ())) > 1:
                result[path] = f"its {name} is shared: {', '.join(owners[part.param])}"
            elif part.param in tables:
                result[path] = f"its {name} is an embedding's, too"
    pairs = ((one, other) for one in functions for other in used if one in used and one != other)
    for one, other in pairs:
        for name, first, second in zip(("weight", "bias"), used[one], used[other], strict=True):
            if first is not None and second is not None and first.meets(second):
                both = ", ".join(f"'{path}'" for path in sorted((one, other)))
                reason = f"its {name} is used by several layers: {both}"
                result = {one: reason, other: reason} | result
    return result


def _owners(model: nn.Module) -> dict[Tensor, list[str]]:
    owners: dict[Tensor, list[str]] = {}
    for path, module in model.named_modules():
        for name, param in module._parameters.items():
            if param is not None:
                owners.setdefault(param, []).append(f"{path}.{name}" if path else name)
    return owners
