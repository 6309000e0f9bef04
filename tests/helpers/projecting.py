"""What random projections are compared with: their matrices, formed whole, times the loop's rows."""

from __future__ import annotations

from math import prod

import torch
from oracle import Grads, regroup
from torch import Tensor

from persample.projections import SJLT, Kronecker, Mask, Projection, Rademacher
from persample.projections.families import maps_of
from persample.projections.maps import Factors, Map

FEW: dict[str, Projection] = {
    "kronecker": Kronecker(3, 2),
    "rademacher": Rademacher(5),
    "sjlt": SJLT(5),
    "sjlt of several": SJLT(5, nonzeros=3),
    "mask": Mask(1),
}


def matrix(projection: Map, numel: int) -> Tensor:
    """Pᵀ, [entries, k], in float64."""
    if isinstance(projection, Factors):
        nothing = torch.zeros(0, dtype=torch.float64)
        left, right = projection.left(torch.arange(projection.shape[0]), torch.float64), projection.right(nothing)
        return torch.kron(left, right)
    return projection.rows(torch.eye(numel, dtype=torch.float64), 0)


def projected(grads: Grads, projection: Projection, per: str) -> dict[str, Tensor]:
    """P g_b, [B, k], by group."""
    groups = regroup(grads, per)
    maps = maps_of(projection, {name: each.new_empty(each.shape[1:]) for name, each in grads.items()}, groups.values())
    found = {}
    for name, rows in grads.items():
        real = torch.view_as_real(rows) if rows.is_complex() else rows
        numel = prod(real.shape[1:])
        found[name] = real.reshape(len(rows), numel).double() @ matrix(maps[name], numel)
    zero = torch.zeros(len(next(iter(grads.values()))), projection.k, dtype=torch.float64)
    return {group: sum((found[name] for name in names), start=zero) for group, names in groups.items()}
