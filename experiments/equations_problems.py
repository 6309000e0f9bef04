"""The differential equations of `experiments.equations`, as the field poses them, with what is known of the answer.

Each is a network of at most 2,100 parameters, a closure of residuals, and an error on points of its own, against an
exact solution or our own spectral one. Boundary and initial conditions that periodic features, an envelope or an offset
can hold are held (`experiments.jets`); the others are residuals. Points are Sobol's; `draw` draws new ones, a part of
them where residuals are large (residual-based adaptive distribution, Wu et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from experiments.equations_reference import Table, korteweg_de_vries
from experiments.equations_reference import allen_cahn as allen_cahn_table
from experiments.jets import Field, Prepared, network
from experiments.pinn_problems import cole_hopf
from fngd.demo.poisson import Problem, Residuals, pictured, square

Settings = dict[str, Any]
Equation = Callable[[Tensor, Tensor], Tensor]
"""Jet [B, C, outputs] and points [B, n] -> residuals [B], or of several equations [B, k]."""
CANDIDATES = 10
"""Points looked at for each that is drawn where residuals are large."""


@dataclass(frozen=True)
class Points:
    """Points in a box that are drawn anew between steps."""

    solution: Field
    equation: Equation
    low: Sequence[float]
    high: Sequence[float]
    sobol: torch.quasirandom.SobolEngine
    now: list[Prepared] = field(default_factory=list)

    @property
    def current(self) -> Prepared:
        return self.now[0]

    def spread(self, count: int) -> Tensor:
        """The next of Sobol's points, [count, n]."""
        low, high = (torch.tensor(list(bound), dtype=torch.float64) for bound in (self.low, self.high))
        return low + (high - low) * self.sobol.draw(count, dtype=torch.float64)

    def draw(self, count: int, adaptive: float = 0.0) -> None:
        """Takes new points, this part of them with a probability proportional to the residual."""
        chosen = round(adaptive * count)
        points = self.spread(count - chosen)
        if chosen:
            seen = self.spread(CANDIDATES * chosen)
            with torch.no_grad():
                size = self.equation(self.solution(self.solution.prepare(seen)), seen).view(len(seen), -1).norm(dim=1)
            generator = torch.Generator().manual_seed(self.sobol.num_generated)
            picked = torch.multinomial(size + 1e-300, chosen, generator=generator)
            points = torch.cat([points, seen[picked]])
        self.now[:] = [self.solution.prepare(points)]

    def residuals(self) -> Residuals:
        """At the points there are now, a group for each equation."""
        found = self.equation(self.solution(self.current), self.current.points)
        return {"interior": found} if found.dim() == 1 else by_column("interior", found)


@dataclass(frozen=True)
class Posed(Problem):
    """A problem whose points can be drawn anew: `draw()`."""

    draw: Callable[[], None] = lambda: None


def posed(
    seed: int, settings: Settings, solution: Field, equation: Equation, box: tuple[Sequence[float], Sequence[float]],
    error: Callable[[], float], *, others: Callable[[], Residuals] = dict, picture: Callable[[], Any] | None = None,
    net: nn.Module | None = None,
) -> Posed:  # fmt: skip
    """Points in the box, with the residuals of the equation there and `others`."""
    sobol = torch.quasirandom.SobolEngine(len(box[0]), scramble=True, seed=seed)
    points = Points(solution, equation, *box, sobol)
    points.draw(settings["points"])
    return Posed(
        net or solution.net,
        lambda: {**points.residuals(), **others()},
        error,
        settings.get("weights", {}),
        picture,
        lambda: points.draw(settings["points"], settings.get("adaptive", 0.0)),
    )


def by_column(name: str, residuals: Tensor) -> Residuals:
    """[B, k] as k groups: one row of the Jacobian a point and group, which is read off the graph in one pass."""
    return {f"{name} {k}": column for k, column in enumerate(residuals.unbind(1))}


def difference(found: Tensor, exact: Tensor) -> float:
    """‖u − u*‖/‖u*‖ over all points and outputs."""
    return (torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact)).item()


def against(solution: Field, points: Tensor, exact: Tensor) -> Callable[[], float]:
    """The relative error, [B, outputs] at points [B, n]."""

    def error() -> float:
        with torch.no_grad():
            return difference(solution.values(points), exact)

    return error


def drawn(solution: Field, exact: Callable[[Tensor], Tensor], box: Any, axes: list[str]) -> Callable[[], Any]:
    """The picture of a solution of two inputs."""
    (a, c), (b, d) = box
    shown = square(41, (a, c), (b, d), centred=False)
    return pictured(_Values(solution), shown, exact(shown)[:, 0], [a, b, c, d], axes)


class _Values(nn.Module):
    def __init__(self, solution: Field) -> None:
        super().__init__()
        self.solution = solution

    def forward(self, points: Tensor) -> Tensor:
        return self.solution.values(points)[:, :1]


def of_table(table: Table) -> tuple[Tensor, Tensor]:
    """Points (t, x), at most 512 places a time, and u there."""
    every = max(1, len(table.places) // 512)
    t, x = (torch.from_numpy(array).double() for array in (table.times, table.places[::every]))
    return torch.cartesian_prod(t, x), torch.from_numpy(table.values[:, ::every].copy()).reshape(-1, 1)


def at_table(table: Table) -> Callable[[Tensor], Tensor]:
    """u at the nearest points of a table, for pictures."""
    values = torch.from_numpy(table.values)

    def nearest(points: Tensor) -> Tensor:
        t = (points[:, 0] * (len(table.times) - 1)).round().long()
        x = ((points[:, 1] + 1) / 2 * len(table.places)).round().long() % len(table.places)
        return values[t, x].unsqueeze(1)

    return nearest


def periodic(length: float, modes: int = 1) -> Callable[[Tensor], Tensor]:
    """Features of (t, x): t, and cos and sin of 2πkx/length up to k = modes."""

    def features(points: Tensor) -> Tensor:
        angles = [2 * math.pi * k / length * points[:, 1] for k in range(1, modes + 1)]
        return torch.stack([2 * points[:, 0] - 1, *(f(a) for a in angles for f in (torch.cos, torch.sin))], 1)

    return features


def burgers(seed: int, settings: Settings) -> Posed:
    """u_t + u u_x = ν u_xx, ν = 0.01/π, on t in [0, 1], x in [−1, 1]; u(0, x) = −sin πx, u(t, ±1) = 0, both held."""
    torch.manual_seed(seed)
    nu, box = 0.01 / math.pi, ((0.0, -1.0), (1.0, 1.0))
    solution = Field(
        network(2, settings["hidden"]),
        orders=(1, 2),
        features=lambda p: torch.stack([2 * p[:, 0] - 1, p[:, 1]], 1),
        envelope=lambda p: p[:, :1] * (1 - p[:, 1:] ** 2),
        offset=lambda p: -torch.sin(math.pi * p[:, 1:]),
    )

    def equation(jet: Tensor, points: Tensor) -> Tensor:
        u, u_t, u_x, u_xx = jet[..., 0].unbind(1)
        return u_t + u * u_x - nu * u_xx

    def exact(points: Tensor) -> Tensor:
        return cole_hopf(points, nu).unsqueeze(1)

    x = torch.linspace(-1, 1, 257).double()
    test = torch.cartesian_prod(torch.linspace(0, 1, 101).double(), x)
    error = against(solution, test, exact(test))
    return posed(seed, settings, solution, equation, box, error, picture=drawn(solution, exact, box, ["t", "x"]))


def allen_cahn(seed: int, settings: Settings) -> Posed:
    """u_t = 10⁻⁴ u_xx + 5(u − u³), periodic on [−1, 1] and even in x, both held; u(0, x) = x² cos πx as residuals.

    The initial value has a kink where the period ends, which no smooth network has: u = network + `kink`.
    """
    torch.manual_seed(seed)
    box = ((0.0, 0.0), (1.0, 1.0))
    modes = settings.get("modes", 1)

    def features(p: Tensor) -> Tensor:
        return torch.stack([2 * p[:, 0] - 1, *(torch.cos(math.pi * k * p[:, 1]) for k in range(1, modes + 1))], 1)

    solution = Field(network(1 + modes, settings["hidden"]), orders=(1, 2), features=features, offset=kink)

    def equation(jet: Tensor, points: Tensor) -> Tensor:
        u, u_t, _, u_xx = jet[..., 0].unbind(1)
        return u_t - 1e-4 * u_xx - 5 * (u - u**3)

    x = torch.linspace(0, 1, settings["initial"]).double()
    start = solution.prepare(torch.stack([torch.zeros_like(x), x], 1), (0, 0))
    wanted = x**2 * torch.cos(math.pi * x)
    table = allen_cahn_table()
    test, values = of_table(table)
    return posed(
        seed, settings, solution, equation, box, against(solution, test, values),
        others=lambda: {"initial": solution(start, (0, 0))[:, 0, 0] - wanted},
        picture=drawn(solution, at_table(table), ((0.0, -1.0), (1.0, 1.0)), ["t", "x"]),
    )  # fmt: skip


def kink(points: Tensor) -> Tensor:
    """2|s| at t = 0, s = 1 − |x| at the end of the period, and what u_t = 10⁻⁴ u_xx − 10u makes of it later, [B, 1].

    That is Allen and Cahn's equation near u = −1, to first order. s is replaced by 2/π·cos πx/2, which is s there and
    smooth elsewhere.
    """
    t, s = points[:, :1], 2 / math.pi * torch.cos(math.pi / 2 * points[:, 1:])
    width = torch.sqrt(4e-4 * t + 1e-30)
    spread = s * torch.erf(s / width) + width / math.sqrt(math.pi) * torch.exp(-((s / width) ** 2))
    return 2 * torch.exp(-10 * t) * spread


def kdv(seed: int, settings: Settings) -> Posed:
    """u_t + u u_x + 0.022² u_xxx = 0, u(0, x) = cos πx, periodic on [−1, 1], both held."""
    torch.manual_seed(seed)
    box = ((0.0, -1.0), (1.0, 1.0))
    modes = settings.get("modes", 1)
    solution = Field(
        network(1 + 2 * modes, settings["hidden"]),
        orders=(1, 3),
        features=periodic(2.0, modes),
        envelope=lambda p: p[:, :1],
        offset=lambda p: torch.cos(math.pi * p[:, 1:]),
    )

    def equation(jet: Tensor, points: Tensor) -> Tensor:
        u, u_t, u_x, _, u_xxx = jet[..., 0].unbind(1)
        return u_t + u * u_x + 0.022**2 * u_xxx

    table = korteweg_de_vries()
    test, values = of_table(table)
    return posed(
        seed, settings, solution, equation, box, against(solution, test, values),
        picture=drawn(solution, at_table(table), box, ["t", "x"]),
    )  # fmt: skip


def helmholtz(seed: int, settings: Settings) -> Posed:
    """Δu + u = q on [−1, 1]², u = 0 on its edge, held; u* = sin πx sin 4πy."""
    torch.manual_seed(seed)
    box = ((-1.0, -1.0), (1.0, 1.0))
    solution = Field(network(2, settings["hidden"]), orders=(2, 2), envelope=lambda p: (1 - p**2).prod(1, keepdim=True))

    def exact(p: Tensor) -> Tensor:
        return (torch.sin(math.pi * p[:, :1]) * torch.sin(4 * math.pi * p[:, 1:])).double()

    def equation(jet: Tensor, points: Tensor) -> Tensor:
        u, _, u_xx, _, u_yy = jet[..., 0].unbind(1)
        return (u_xx + u_yy + u) / (17 * math.pi**2) - (1 / (17 * math.pi**2) - 1) * exact(points)[:, 0]

    test = square(101, *box, centred=False)
    error = against(solution, test, exact(test))
    return posed(seed, settings, solution, equation, box, error, picture=drawn(solution, exact, box, ["x", "y"]))


def advection(seed: int, settings: Settings) -> Posed:
    """u_t + 30 u_x = 0 on t in [0, 1], periodic in x on [0, 2π], u(0, x) = sin x, both held; u* = sin(x − 30t)."""
    torch.manual_seed(seed)
    box, speed = ((0.0, 0.0), (1.0, 2 * math.pi)), 30.0
    solution = Field(
        network(3, settings["hidden"]),
        orders=(1, 1),
        features=periodic(2 * math.pi),
        envelope=lambda p: p[:, :1],
        offset=lambda p: torch.sin(p[:, 1:]),
    )

    def equation(jet: Tensor, points: Tensor) -> Tensor:
        _, u_t, u_x = jet[..., 0].unbind(1)
        return u_t / speed + u_x

    def exact(p: Tensor) -> Tensor:
        return torch.sin(p[:, 1:] - speed * p[:, :1])

    test = square(101, *box, centred=False)
    error = against(solution, test, exact(test))
    return posed(seed, settings, solution, equation, box, error, picture=drawn(solution, exact, box, ["t", "x"]))


def kovasznay(seed: int, settings: Settings) -> Posed:
    """Stationary Navier–Stokes at Re = 40 on [−½, 1] × [−½, 3/2]: Kovasznay's flow (1948), its edge given.

    u = 1 − e^(λx) cos 2πy, v = λ/(2π) e^(λx) sin 2πy, p = (1 − e^(2λx))/2, λ = Re/2 − √(Re²/4 + 4π²). The error is that
    of the velocities, for the pressure is known up to a constant.
    """
    torch.manual_seed(seed)
    box, reynolds = ((-0.5, -0.5), (1.0, 1.5)), 40.0
    rate = reynolds / 2 - math.sqrt(reynolds**2 / 4 + 4 * math.pi**2)

    def exact(p: Tensor) -> Tensor:
        grown, angle = torch.exp(rate * p[:, 0]), 2 * math.pi * p[:, 1]
        u, v = 1 - grown * torch.cos(angle), rate / (2 * math.pi) * grown * torch.sin(angle)
        return torch.stack([u, v, (1 - grown**2) / 2], 1)

    def features(p: Tensor) -> Tensor:
        return (p - torch.tensor([0.25, 0.5]).to(p)) / torch.tensor([0.75, 1.0]).to(p)

    solution = Field(network(2, settings["hidden"], 3), orders=(2, 2), features=features)

    def equation(jet: Tensor, points: Tensor) -> Tensor:
        (u, v, _), (u_x, v_x, p_x), (u_xx, v_xx, _), (u_y, v_y, p_y), (u_yy, v_yy, _) = (
            part.unbind(1) for part in jet.unbind(1)
        )
        return torch.stack(
            [
                u * u_x + v * u_y + p_x - (u_xx + u_yy) / reynolds,
                u * v_x + v * v_y + p_y - (v_xx + v_yy) / reynolds,
                u_x + v_y,
            ],
            1,
        )

    ticks = torch.linspace(0, 1, settings["edge"]).double().unsqueeze(1)
    low, high = (torch.tensor(bound).double() for bound in box)
    sides = [torch.cat([ticks, torch.full_like(ticks, end)], 1) for end in (0.0, 1.0)]
    edge = low + (high - low) * torch.cat([*sides, *(side.flip(1) for side in sides)])
    at_edge, velocities = solution.prepare(edge, (0, 0)), exact(edge)[:, :2]
    test = square(61, *box, centred=False)
    values = exact(test)[:, :2]

    def error() -> float:
        with torch.no_grad():
            return difference(solution.values(test)[:, :2], values)

    return posed(
        seed, settings, solution, equation, box, error,
        others=lambda: by_column("boundary", solution(at_edge, (0, 0))[:, 0, :2] - velocities),
        picture=drawn(solution, exact, box, ["x", "y"]),
    )  # fmt: skip


class _WithCoefficients(nn.Module):
    def __init__(self, net: nn.Module, count: int) -> None:
        super().__init__()
        self.net, self.coefficients = net, nn.Parameter(torch.zeros(count, dtype=torch.float64))


def inverse(seed: int, settings: Settings) -> Posed:
    """u_t + a u u_x = 0.01 b u_xx with a, b unknown, from 1,000 values with 5 % noise; the error is that of (a, b).

    The values are of Burgers' equation as above, a = 1 and b = 1/π, anywhere in the domain; nothing else is known of u.
    Noise is of normal distribution, its deviation 5 % of that of the values. Both coefficients begin at 0.
    """
    torch.manual_seed(seed)
    box = ((0.0, -1.0), (1.0, 1.0))
    net = network(2, settings["hidden"])
    both = _WithCoefficients(net, 2)
    truth = torch.tensor([1.0, 1 / math.pi], dtype=torch.float64)
    solution = Field(net, orders=(1, 2), features=lambda p: torch.stack([2 * p[:, 0] - 1, p[:, 1]], 1))

    def exact(points: Tensor) -> Tensor:
        return cole_hopf(points, 0.01 / math.pi).unsqueeze(1)

    def equation(jet: Tensor, points: Tensor) -> Tensor:
        u, u_t, u_x, u_xx = jet[..., 0].unbind(1)
        a, b = both.coefficients
        return u_t + a * u * u_x - 0.01 * b * u_xx

    generator = torch.Generator().manual_seed(30_000 + seed)
    seen = torch.rand(1000, 2, dtype=torch.float64, generator=generator) * torch.tensor([1.0, 2.0]).double()
    seen = seen - torch.tensor([0.0, 1.0]).double()
    clean = exact(seen)[:, 0]
    data = clean + 0.05 * clean.std() * torch.randn(1000, dtype=torch.float64, generator=generator)
    at_data = solution.prepare(seen, (0, 0))

    def error() -> float:
        with torch.no_grad():
            return difference(both.coefficients, truth)

    return posed(
        seed, settings, solution, equation, box, error, net=both,
        others=lambda: {"data": solution(at_data, (0, 0))[:, 0, 0] - data},
        picture=drawn(solution, exact, box, ["t", "x"]),
    )  # fmt: skip


def poisson(dimension: int) -> Callable[[int, Settings], Posed]:
    """−Δu = π² Σ cos πx_i on the unit cube, u = Σ cos πx_i on its faces, as residuals."""

    def pose(seed: int, settings: Settings) -> Posed:
        torch.manual_seed(seed)
        box = ((0.0,) * dimension, (1.0,) * dimension)
        solution = Field(network(dimension, settings["hidden"]), orders=(2,) * dimension, features=lambda p: 2 * p - 1)

        def exact(p: Tensor) -> Tensor:
            return torch.cos(math.pi * p).sum(1, keepdim=True)

        def equation(jet: Tensor, points: Tensor) -> Tensor:
            return jet[:, 2::2, 0].sum(1) + math.pi**2 * exact(points)[:, 0]

        generator = torch.Generator().manual_seed(40_000 + seed)
        faces = torch.rand(settings["boundary"], dimension, dtype=torch.float64, generator=generator)
        face = torch.arange(len(faces)) % (2 * dimension)
        faces[torch.arange(len(faces)), face // 2] = (face % 2).double()
        at_faces, values = solution.prepare(faces, (0,) * dimension), exact(faces)[:, 0]
        test = torch.rand(4000, dimension, dtype=torch.float64, generator=generator)
        return posed(
            seed, settings, solution, equation, box, against(solution, test, exact(test)),
            others=lambda: {"boundary": solution(at_faces, (0,) * dimension)[:, 0, 0] - values},
        )  # fmt: skip

    pose.__doc__ = poisson.__doc__
    return pose


PROBLEMS: dict[str, Callable[[int, Settings], Posed]] = {
    "burgers": burgers,
    "allen-cahn": allen_cahn,
    "kdv": kdv,
    "helmholtz": helmholtz,
    "advection": advection,
    "kovasznay": kovasznay,
    "inverse": inverse,
    "poisson5": poisson(5),
    "poisson10": poisson(10),
}
TITLES = {
    "burgers": "Burgers, ν = 0.01/π",
    "allen-cahn": "Allen–Cahn, D = 10⁻⁴",
    "kdv": "Korteweg–de Vries",
    "helmholtz": "Helmholtz, a = (1, 4)",
    "advection": "advection, β = 30",
    "kovasznay": "Navier–Stokes, Kovasznay, Re = 40",
    "inverse": "inverse Burgers, 5 % noise",
    "poisson5": "Poisson, 5-D",
    "poisson10": "Poisson, 10-D",
}
