"""Residuals as a closure returns them, and the one scaled vector that Gauss–Newton works on.

symbol      meaning                                                             shape
r_g         residuals of group g (interior, boundary, data)                     [B_g]
w_g         weight of the group's mean square in the loss
ω_gb        weights of single residuals (reweighing); 1 without                 [B_g]
s           all residuals, s_gb = √(w_g ω_gb/B_g)·r_gb                          [B], B = Σ_g B_g
L           the loss, ½ Σ_g w_g·mean_b ω_gb r_gb² = ½‖s‖²
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

SINGLE = "residual"
"""Name of the only group, where a closure returns one tensor."""


@dataclass(frozen=True)
class Residuals:
    """Named groups of residuals with their graphs, the factor √(w_g/B_g) of each, and √ω where there are weights."""

    groups: dict[str, Tensor]
    factors: dict[str, float]
    roots: dict[str, Tensor] = field(default_factory=dict)

    def weighted(self, weights: Mapping[str, Tensor]) -> Residuals:
        """The same with weights ω [B_g] by group. Raises ValueError where a group has another size."""
        for name, group in self.groups.items():
            if name in weights and len(weights[name]) != len(group):
                raise ValueError(
                    f"residual group {name!r} has {len(group)} entries, and in the first call of this step it had "
                    f"{len(weights[name])}. With reweigh= each residual has a weight, so all calls of a step must be "
                    "at the same points; draw them between steps, outside the closure"
                )
        return replace(self, roots={name: weight.sqrt() for name, weight in weights.items()})

    def factor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """√(w_g ω_gb/B_g) of rows of a group, [stop − start]; one number, [], without ω."""
        factor = torch.as_tensor(self.factors[name], dtype=self.groups[name].dtype, device=self.groups[name].device)
        return factor if name not in self.roots else factor * self.roots[name][start:stop]

    @property
    def count(self) -> int:
        """B, the residuals of all groups together."""
        return sum(len(group) for group in self.groups.values())

    @property
    def scaled(self) -> Float[Tensor, " batch"]:
        """s, with its graph."""
        with torch.enable_grad():
            return torch.cat([group * self.factor(name) for name, group in self.groups.items()])

    @property
    def finite(self) -> bool:
        """Whether all residuals are finite; waits for the device."""
        return bool(torch.stack([group.detach().isfinite().all() for group in self.groups.values()]).all())

    def loss(self, dtype: torch.dtype = torch.float64) -> float:
        """L, summed in float64; inf where a residual is NaN, so that comparisons reject it."""
        squares = [(group.detach().to(dtype) * self.factor(name)).square().sum() for name, group in self.groups.items()]
        value = torch.stack(squares).sum().item() / 2
        return math.inf if math.isnan(value) else value


def read_residuals(returned: Any, weights: Mapping[str, float] | None = None) -> Residuals:
    """Returns the residuals that a closure returned: a vector, a dict name -> vector, or a sequence of vectors.

    Arguments:
        returned: a tensor [B]; or several, as a dict, or as a list or tuple, whose groups are named "0", "1", ….
        weights: w_g ≥ 0 by name; 1 for those not named.

    Raises:
        TypeError: something else, or integers or complex numbers.
        ValueError: a residual that is no vector or without entries; a weight out of range or of
            no group.

    >>> found = read_residuals({"inside": torch.ones(4), "edge": torch.ones(2)}, {"edge": 8.0})
    >>> found.scaled  # √(1/4) and √(8/2)
    tensor([0.5000, 0.5000, 0.5000, 0.5000, 2.0000, 2.0000])
    """
    if isinstance(returned, Tensor):
        named = {SINGLE: returned}
    elif isinstance(returned, Mapping):
        named = {str(name): group for name, group in returned.items()}
    elif isinstance(returned, Sequence) and not isinstance(returned, str):
        named = {str(place): group for place, group in enumerate(returned)}
    else:
        raise TypeError(
            f"the closure returned {type(returned).__name__}; it must return the residuals: a tensor [B], or named "
            "groups as a dict {'interior': tensor [B1], 'boundary': tensor [B2]}"
        )
    if not named:
        raise ValueError("the closure returned no residuals: its dict or tuple is empty")
    for name, group in named.items():
        _check_group(name, group)
    first = next(iter(named.values()))
    for name, group in named.items():
        if (group.dtype, group.device) != (first.dtype, first.device):
            raise ValueError(
                f"residual group {name!r} is {group.dtype} on {group.device}, the first one {first.dtype} on "
                f"{first.device}; all must have one dtype and device"
            )
    weights = dict(weights or {})
    unknown = sorted(set(weights) - set(named))
    if unknown:
        raise ValueError(f"weights name {unknown}; the closure's groups are {list(named)}")
    return Residuals(named, {name: math.sqrt(weights.get(name, 1.0) / len(group)) for name, group in named.items()})


def finite_or_error(residuals: Residuals) -> Residuals:
    """Returns the residuals. Raises ValueError where one is NaN or infinite, with their numbers by group."""
    if residuals.finite:
        return residuals
    bad: dict[str, Any] = {name: int((~group.isfinite()).sum()) for name, group in residuals.groups.items()}
    raise ValueError(
        f"residuals are not finite at the current parameters (entries by group: {bad}), so there is no direction. "
        "Look for a division by zero or a square root at zero in the closure; if earlier steps diverged, use "
        "line_search=True or a larger damping"
    )


def check_weights(weights: Mapping[str, float] | None) -> None:
    """Raises ValueError for a weight that is negative or not finite."""
    if weights is not None and not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a dict, name of a residual group -> weight; got {weights!r}")
    for name, weight in (weights or {}).items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"weights[{name!r}]={weight}; a weight of a mean square must be ≥ 0 and finite")


def _check_group(name: str, group: Any) -> None:
    if not isinstance(group, Tensor):
        raise TypeError(f"residual group {name!r} is {type(group).__name__}; it must be a tensor of shape [B]")
    if not group.is_floating_point():
        raise TypeError(f"residual group {name!r} is {group.dtype}; residuals must be real floating-point numbers")
    if group.dim() == 0:
        raise ValueError(
            f"residual group {name!r} is a scalar: a loss, perhaps? Gauss–Newton needs the residuals themselves, one "
            "for each point [B]; return prediction − target without mean(), sum() or square()"
        )
    if group.dim() > 1:
        raise ValueError(
            f"residual group {name!r} has shape {list(group.shape)}; it must be [B]. Drop an axis of size 1 with "
            "squeeze(-1); of several residuals for each point make a group each, {'u': r[:, 0], 'v': r[:, 1]} (in one "
            "long vector, by flatten(), they cost as many passes as there are points)"
        )
    if not len(group):
        raise ValueError(f"residual group {name!r} is empty; leave a group without points out")
