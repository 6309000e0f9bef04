"""Least-squares problems with a known answer: three differential equations and one regression on real data.

Each problem is a network, a closure of residuals, and an error that is measured on points of its own. Laplacians and
other derivatives with respect to inputs are two or three lines each; nothing else is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
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
    """−Δu = 2π² sin πx sin πy on the unit square, u = 0 on its edge; 30 × 30 interior and 4 × 30 edge points."""
    torch.manual_seed(seed)
    net, side = mlp(2, settings["width"], settings["width"], 1), settings["side"]
    inside = square(side, (0, 0), (1, 1), centred=True).requires_grad_()
    ticks = (torch.arange(side).double() + 0.5) / side
    zero, one = torch.zeros(side).double(), torch.ones(side).double()
    edge = torch.cat([torch.stack(pair, 1) for pair in ((ticks, zero), (ticks, one), (zero, ticks), (one, ticks))])
    source = 2 * math.pi**2 * torch.sin(math.pi * inside.detach()).prod(1)
    test, shown = (square(n, (0, 0), (1, 1), centred=False) for n in (60, 41))

    def exact(x: Tensor) -> Tensor:
        return torch.sin(math.pi * x).prod(1)

    def residuals() -> Residuals:
        return {"interior": derivatives(net, inside)[2].sum(1) + source, "boundary": net(edge).squeeze(1)}

    picture = pictured(net, shown, exact(shown), [0, 1, 0, 1], ["x", "y"])
    return Problem(net, residuals, relative(net, test, exact(test)), picture=picture)


def poisson5(seed: int, settings: dict[str, Any]) -> Problem:
    """−Δu = π² Σ cos πx_i on the unit cube in five dimensions, u = Σ cos πx_i on its faces; Sobol points."""
    torch.manual_seed(seed)
    net = mlp(5, settings["width"], settings["width"], 1)
    sobol = torch.quasirandom.SobolEngine(5, scramble=True, seed=seed)
    inside = sobol.draw(settings["interior"], dtype=torch.float64).requires_grad_()
    edge = sobol.draw(settings["boundary"], dtype=torch.float64)
    face = torch.arange(len(edge)) % 10  # an axis and one of its two ends
    edge[torch.arange(len(edge)), face // 2] = (face % 2).double()
    test = torch.rand(4000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(10_000 + seed))

    def exact(x: Tensor) -> Tensor:
        return torch.cos(math.pi * x).sum(1)

    source, values = math.pi**2 * exact(inside.detach()), exact(edge)

    def residuals() -> Residuals:
        return {"interior": derivatives(net, inside)[2].sum(1) + source, "boundary": net(edge).squeeze(1) - values}

    return Problem(net, residuals, relative(net, test, exact(test)), settings["weights"])


def burgers(seed: int, settings: dict[str, Any]) -> Problem:
    """u_t + u u_x = ν u_xx on [−1, 1] × [0, 1], u(0, x) = −sin πx, u(t, ±1) = 0; columns (t, x); Sobol points.

    `settings["side"]`² points on a grid instead, where it is given: its 30 values of x are 0.07 apart, as wide as the
    shock.
    """
    torch.manual_seed(seed)
    net, nu = mlp(2, settings["width"], settings["width"], 1), settings["viscosity"]
    if "side" in settings:
        inside, side = square(settings["side"], (0, -1), (1, 1), centred=True), settings["side"]
    else:
        drawn = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(
            settings["interior"], dtype=torch.float64
        )
        inside, side = drawn * torch.tensor([1.0, 2.0]).double() - torch.tensor([0.0, 1.0]).double(), 30
    inside.requires_grad_()
    x = torch.linspace(-1, 1, 2 * side).double()
    start = torch.stack([torch.zeros_like(x), x], 1)
    t = torch.linspace(0, 1, side).double()
    edge = torch.cat([torch.stack([t, torch.full_like(t, end)], 1) for end in (-1.0, 1.0)])
    initial = -torch.sin(math.pi * x)
    test, shown = (square(n, (0, -1), (1, 1), centred=False) for n in (60, 41))

    def residuals() -> Residuals:
        u, slope, second = derivatives(net, inside)
        return {
            "interior": slope[:, 0] + u * slope[:, 1] - nu * second[:, 1],
            "initial": net(start).squeeze(1) - initial,
            "boundary": net(edge).squeeze(1),
        }

    error = relative(net, test, cole_hopf(test, nu))
    return Problem(
        net,
        residuals,
        error,
        settings["weights"],
        pictured(net, shown, cole_hopf(shown, nu), [0, 1, -1, 1], ["t", "x"]),
    )


def cole_hopf(points: Tensor, nu: float, nodes: int = 150) -> Tensor:
    """The exact solution of Burgers' equation from −sin πx by Cole and Hopf's transformation, at points (t, x).

    u = −∫ sin π(x−η) w dη / ∫ w dη with w = exp(−cos π(x−η)/(2πν) − η²/(4νt)), by Gauss–Hermite quadrature
    (Basdevant et al. 1986).
    """
    z, weight = (torch.from_numpy(array) for array in np.polynomial.hermite.hermgauss(nodes))
    t, x = points[:, :1], points[:, 1:]
    place = math.pi * (x - 2 * torch.sqrt(nu * t) * z)
    exponent = -torch.cos(place) / (2 * math.pi * nu)
    w = weight * torch.exp(exponent - exponent.amax(1, keepdim=True))
    return -(torch.sin(place) * w).sum(1) / w.sum(1)


def diabetes(seed: int, settings: dict[str, Any]) -> Problem:
    """Progression of diabetes from ten measurements (scikit-learn's copy): 342 patients to fit, 100 to test."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    x, y = (torch.from_numpy(array).double() for array in (data.data, data.target))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(20_000 + seed))
    train, test = order[100:], order[:100]
    x, y = (x - x[train].mean(0)) / x[train].std(0), (y - y[train].mean()) / y[train].std()
    torch.manual_seed(seed)
    net = mlp(10, settings["width"], 1)

    def error() -> float:
        with torch.no_grad():
            return ((net(x[test]).squeeze(1) - y[test]).square().mean().sqrt() / y[test].std()).item()

    return Problem(net, lambda: {"data": net(x[train]).squeeze(1) - y[train]}, error)


PROBLEMS: dict[str, Callable[[int, dict[str, Any]], Problem]] = {
    "poisson2": poisson2,
    "burgers": burgers,
    "poisson5": poisson5,
    "diabetes": diabetes,
}
TITLES = {
    "poisson2": "Poisson, 2-D",
    "burgers": "Burgers, 1-D in time",
    "poisson5": "Poisson, 5-D",
    "diabetes": "regression, diabetes data",
}
