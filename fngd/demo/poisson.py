"""A Poisson equation to be solved by a network, and what such problems are made of.

    −Δu = 2π² sin πx sin πy on the unit square, u = 0 on its edge;   u* = sin πx sin πy

A problem is a network, a closure of residuals, and an error that is measured on points of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

Residuals = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A network to be fitted; `weights` of the groups are the same for every method."""

    net: nn.Module
    residuals: Callable[[], Residuals]
    error: Callable[[], float]
    """Relative L2 error of the solution on test points; for data, the test error over the targets' spread."""
    weights: dict[str, float] = field(default_factory=dict)
    picture: Callable[[], dict[str, Any]] | None = None
    """Solution and error on a coarse grid, for problems in two variables."""

    def loss(self) -> Tensor:
        """½ Σ_g w_g·mean(r_g²), the loss that GaussNewton minimises."""
        parts = [self.weights.get(name, 1.0) * r.square().mean() / 2 for name, r in self.residuals().items()]
        return torch.stack(parts).sum()


def mlp(*sizes: int) -> nn.Sequential:
    """A tanh network in float64."""
    layers: list[nn.Module] = []
    for inp, out in pairwise(sizes):
        layers += [nn.Linear(inp, out, dtype=torch.float64), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def derivatives(net: nn.Module, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u [B], its gradient [B, n] and second derivatives ∂²u/∂x_i² [B, n]; `points` require a gradient."""
    u = net(points).squeeze(1)
    (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    second = [torch.autograd.grad(s.sum(), points, create_graph=True)[0][:, i] for i, s in enumerate(slope.T)]
    return u, slope, torch.stack(second, 1)


def relative(net: nn.Module, points: Tensor, exact: Tensor) -> Callable[[], float]:
    """‖u − u*‖/‖u*‖ over the points."""

    def error() -> float:
        with torch.no_grad():
            return (torch.linalg.vector_norm(net(points).squeeze(1) - exact) / torch.linalg.vector_norm(exact)).item()

    return error


def pictured(net: nn.Module, points: Tensor, exact: Tensor, extent: list[float], axes: list[str]) -> Callable:
    """Solution and error on a square grid of points."""
    side = math.isqrt(len(points))

    def picture() -> dict[str, Any]:
        with torch.no_grad():
            u = net(points).squeeze(1)
        grids = {"solution": u.view(side, side), "error": (u - exact).view(side, side)}
        return {**{name: grid.tolist() for name, grid in grids.items()}, "extent": extent, "axes": axes}

    return picture


def square(side: int, low: tuple[float, float], high: tuple[float, float], *, centred: bool) -> Tensor:
    """side × side points of a rectangle; centred in their cells, or with the edges."""
    ticks = (torch.arange(side).double() + 0.5) / side if centred else torch.linspace(0, 1, side).double()
    return torch.cartesian_prod(*(a + (b - a) * ticks for a, b in zip(low, high, strict=True)))


def poisson2(seed: int, settings: dict[str, Any]) -> Problem:
    """−Δu = 2π² sin πx sin πy on the unit square, u = 0 on its edge; side² inner and 4·side edge points."""
    torch.manual_seed(seed)
    net, side = mlp(2, settings["width"], settings["width"], 1), settings["side"]
    inside = square(side, (0.0, 0.0), (1.0, 1.0), centred=True).requires_grad_()
    ticks = (torch.arange(side).double() + 0.5) / side
    zero, one = torch.zeros(side).double(), torch.ones(side).double()
    edge = torch.cat([torch.stack(pair, 1) for pair in ((ticks, zero), (ticks, one), (zero, ticks), (one, ticks))])
    source = 2 * math.pi**2 * torch.sin(math.pi * inside.detach()).prod(1)
    test, shown = (square(n, (0.0, 0.0), (1.0, 1.0), centred=False) for n in (60, 41))

    def exact(x: Tensor) -> Tensor:
        return torch.sin(math.pi * x).prod(1)

    def residuals() -> Residuals:
        return {"interior": derivatives(net, inside)[2].sum(1) + source, "boundary": net(edge).squeeze(1)}

    picture = pictured(net, shown, exact(shown), [0.0, 1.0, 0.0, 1.0], ["x", "y"])
    return Problem(net, residuals, relative(net, test, exact(test)), picture=picture)
