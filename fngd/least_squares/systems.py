"""The damped least-squares step in whichever space it is cheapest.

d = (JᵀJ + λI)⁻¹ Jᵀ s  =  Jᵀ (J Jᵀ + λI)⁻¹ s        (push-through identity)

system       matrix           taken where                            error
samples      J Jᵀ [B, B]      B ≤ P and B ≤ max_samples              rounding
parameters   JᵀJ  [P, P]      P < B and P ≤ max_samples              rounding
sketch       JᵀJ, never       both are larger                        relative residual of (JᵀJ + λI)d = Jᵀs, stated
             formed
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fngd.least_squares.jacobian import Jacobian
from fngd.least_squares.solvers import DenseSolver, Preconditioner, pcg

SOLVES = ("auto", "samples", "parameters", "sketch")


@dataclass(frozen=True)
class SketchOptions:
    """Options of the randomised solve.

    Arguments:
        rank: m, random sums of the points whose gradients precondition; more make fewer iterations. They take m·P
            numbers of memory, of which there are never more than 512 MiB, and the work of a dense m × m system.
        tolerance: ‖(JᵀJ + λI)d − Jᵀs‖/‖Jᵀs‖ to stop at, > 0.
        iterations: most conjugate-gradient steps, each of one backward pass and one differentiated one.
        seed: of the random signs.

    >>> from fngd import GaussNewton
    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> opt = GaussNewton([weight], solve="sketch", sketch=SketchOptions(rank=64, tolerance=1e-3))
    """

    rank: int = 2048
    tolerance: float = 1e-2
    iterations: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "iterations"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise ValueError(f"sketch {name}={getattr(self, name)!r}; it must be an integer ≥ 1")
        if not self.tolerance > 0:
            raise ValueError(f"sketch tolerance={self.tolerance}; it must be > 0")


@dataclass(frozen=True)
class Solved:
    """A direction, how it was found, and the relative residual of its linear system."""

    direction: Float[Tensor, " size"]
    method: str
    error: float | None
    iterations: int = 0


class SampleSystem:
    """J Jᵀ, in float64."""

    def __init__(self, jacobian: Jacobian) -> None:
        self._jacobian, self._solver = jacobian, DenseSolver(jacobian.gram(), jacobian.noise)
        self.trace = _finite(self._solver.trace)

    def solve(self, rhs: Float[Tensor, " batch"], damping: float) -> Solved:
        """By Cholesky; by eigenvalues where K + λI is not definite."""
        return Solved(self._jacobian.transposed(self._solver(rhs, damping)), self._solver.method, None)


class ParameterSystem:
    """JᵀJ, in float64."""

    def __init__(self, jacobian: Jacobian) -> None:
        self._jacobian, self._solver = jacobian, DenseSolver(jacobian.normal_matrix(), jacobian.noise)
        self.trace = _finite(self._solver.trace)

    def solve(self, rhs: Float[Tensor, " batch"], damping: float) -> Solved:
        """By Cholesky; by eigenvalues where JᵀJ + λI is not definite."""
        found = self._solver(self._jacobian.transposed(rhs), damping)
        return Solved(found, f"{self._solver.method}, parameters", None)


class SketchedSystem:
    """JᵀJ known by products only: conjugate gradients, preconditioned by the gradients of random sums of points."""

    def __init__(self, jacobian: Jacobian, options: SketchOptions, step: int) -> None:
        self._jacobian, self._options = jacobian, options
        generator = torch.Generator().manual_seed(options.seed + step)
        self._precondition = Preconditioner(jacobian.compressed(options.rank, generator))
        self.trace = _finite(self._precondition.trace)
        """An estimate without bias."""
        dtype = jacobian.scaled.dtype  # of the products; smaller eigenvalues than these are rounding
        self._floor = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps * self.trace

    def solve(self, rhs: Float[Tensor, " batch"], damping: float) -> Solved:
        """To the tolerance, or as far as the iterations go: `error` says."""
        damping = max(damping, self._floor)
        found = pcg(
            lambda v: self._jacobian.transposed(self._jacobian.apply(v)).double(),
            self._jacobian.transposed(rhs).double(), damping, lambda v: self._precondition(v, damping),
            tolerance=self._options.tolerance, limit=self._options.iterations,
        )  # fmt: skip
        return Solved(found.x, "sketch", found.error, found.iterations)


System = SampleSystem | ParameterSystem | SketchedSystem
"""The linear system of one point; solved for several dampings where a step is tried again."""


def choose(solve: str, batch: int, size: int, max_samples: int) -> str:
    """Returns which system is formed: the smaller of B × B and P × P, a sketch where neither is ≤ max_samples.

    >>> choose("auto", 1000, 4000, 5000), choose("auto", 10**6, 4000, 5000), choose("auto", 10**6, 10**6, 5000)
    ('samples', 'parameters', 'sketch')
    """
    if solve != "auto":
        return solve
    if min(batch, size) > max_samples:
        return "sketch"
    return "samples" if batch <= size else "parameters"


def form(kind: str, jacobian: Jacobian, options: SketchOptions, step: int) -> System:
    """The system of a kind that `choose` returned."""
    if kind == "sketch":
        return SketchedSystem(jacobian, options, step)
    return SampleSystem(jacobian) if kind == "samples" else ParameterSystem(jacobian)


def _finite(trace: float) -> float:
    """tr K is finite where all rows of J are."""
    if math.isfinite(trace):
        return trace
    raise ValueError(
        "derivatives of the residuals with respect to parameters are not finite, though the residuals are. Look for "
        "a square root, norm or power at zero in the closure (torch.sqrt(x + 1e-12)), or for float32 overflow"
    )
