"""Quantities of parameters, added up over all of them or over those of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

Per = Literal["total", "layer", "param"]
PerPosition = Literal["total", "layer", "param", "position"]


def layer_of(name: str) -> str:
    """The path of the module that owns a parameter; "" is the model."""
    return name.rpartition(".")[0]


def layers_of(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The parameters of each layer, by its path."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(layer_of(name), []).append(name)
    return {layer: tuple(each) for layer, each in found.items()}


def groups_of(names: Iterable[str], per: Per) -> list[tuple[str, ...]]:
    """The names of the parameters that are added up, as `per` says."""
    if per == "layer":
        return list(layers_of(names).values())
    return [(name,) for name in names] if per == "param" else [tuple(names)]


def grouped(
    values: Mapping[str, Tensor], per: Per, device: torch.device, together: Callable[[list[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """Values of parameters, added up as `per` says; the total under the name "", on the device.

    Args:
        values: by parameter; one at least where the total is asked for.
        per: "total", "layer" or "param".
        device: of the total.
        together: adds up.
    """
    if per == "param":
        return dict(values)
    if per == "layer":
        return {layer: together([values[name] for name in names]) for layer, names in layers_of(values).items()}
    if per == "total":
        return {"": together([value.to(device) for value in values.values()])}
    raise ValueError(f"per must be 'total', 'layer' or 'param', of norms and gram also 'position'; got {per!r}")


def transposed(gram: Tensor | dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
    """The Gram matrix, [B, B'] or [B, T, B', T'], with its two batches swapped."""
    if isinstance(gram, dict):
        return {name: _swapped(each) for name, each in gram.items()}
    return _swapped(gram)


def _swapped(gram: Tensor) -> Tensor:
    return gram.T if gram.ndim == 2 else gram.permute(2, 3, 0, 1)


def total(values: dict[str, Tensor], per: Per) -> Tensor | dict[str, Tensor]:
    """The value itself where it is of all parameters."""
    return values[""] if per == "total" else values
