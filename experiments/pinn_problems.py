"""Least-squares problems with a known answer: three differential equations and one regression on real data.

The Poisson equation in two variables, and what all problems are made of, is the one of `python -m fngd demo`.

Each problem is a network, a closure of residuals, and an error that is measured on points of its own. Laplacians and
other derivatives with respect to inputs are two or three lines each; nothing else is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fngd.demo.poisson import Problem, Residuals, derivatives, mlp, pictured, poisson2, relative, square


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
        inside, side = square(settings["side"], (0.0, -1.0), (1.0, 1.0), centred=True), settings["side"]
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
    test, shown = (square(n, (0.0, -1.0), (1.0, 1.0), centred=False) for n in (60, 41))

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
        pictured(net, shown, cole_hopf(shown, nu), [0.0, 1.0, -1.0, 1.0], ["t", "x"]),
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
