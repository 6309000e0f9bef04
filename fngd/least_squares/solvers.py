"""Solving with a damped positive semidefinite matrix: dense, or by conjugate gradients where it is known by products.

    symbol    meaning                                                                shape
    A         J Jᵀ in sample space or JᵀJ in parameter space                         [n, n]
    J̃         few rows that stand for all, E[J̃ᵀJ̃] = JᵀJ (`Jacobian.compressed`)      [m, P]
    M         the preconditioner, J̃ᵀJ̃ + λI                                           [P, P]

    M⁻¹v = (v − J̃ᵀ(J̃J̃ᵀ + λI)⁻¹J̃v)/λ          (Woodbury): one dense matrix of size m

Where m is a few times the number of eigenvalues of JᵀJ above λ, those of M⁻¹(JᵀJ + λI) are near 1 and a few iterations
are enough. Sources: Clarkson and Woodruff (2013) for the compression, each row with a random sign in one of m sums;
Avron, Maymounkov, Toledo, "Blendenpik" (2010) for sketches that precondition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""v -> A v."""
SYMMETRIC_BLOCKS = 4
"""J Jᵀ is formed in this many row blocks, those above the diagonal alone: 5/8 of the whole product."""


@dataclass(frozen=True)
class Solution:
    """x, the relative residual ‖(A + λI)x − b‖/‖b‖ that is left, and the iterations."""

    x: Float[Tensor, " size"]
    error: float
    iterations: int = 0


class DenseSolver:
    """Solves with one K and any number of dampings and right-hand sides; each damping is factorised once.

    `noise`: size of rounding errors in K, or of what those in J are in it, over tr K; no damping is below it.
    """

    def __init__(self, gram: Float[Tensor, "batch batch"], noise: float = 0.0) -> None:
        self.gram = gram.double()
        self.trace = self.gram.trace().item()
        self.floor = noise * self.trace
        self._damping: float | None = None
        self._factor: Tensor | None = None

    def __call__(self, rhs: Float[Tensor, " batch"], damping: float) -> Float[Tensor, " batch"]:
        """Returns (K + λI)⁻¹ s in float64: by Cholesky, or where that fails the least-squares solution.

        The fallback drops the eigenvalues below B·ε·‖K‖, rounding's own size, so λ = 0 and a singular K give the
        solution of least norm.
        """
        damping = max(damping, self.floor)
        if damping != self._damping:
            self._damping = damping
            self._factor, failed = torch.linalg.cholesky_ex(_shifted(self.gram, damping))
            if failed.item() or (damping == 0 and _nearly_singular(self._factor)):
                self._factor = None
        if self._factor is not None:
            return torch.cholesky_solve(rhs.double().unsqueeze(1), self._factor).squeeze(1)
        values, vectors = torch.linalg.eigh(self.gram)
        floor = len(values) * torch.finfo(values.dtype).eps * values[-1].clamp_min(0)
        inverse = torch.where(values > floor, 1 / (values + damping), torch.zeros_like(values))
        return vectors @ (inverse * (vectors.T @ rhs.double()))

    @property
    def method(self) -> str:
        """How the last system was solved."""
        return "cholesky" if self._factor is not None else "eigenvalues"


class Preconditioner:
    """v -> M⁻¹v, with M = J̃ᵀJ̃ + λI, for any number of dampings.

    λ is at least `floor`·tr: below that the difference that Woodbury's identity takes is rounding.
    """

    floor = 1e-13

    def __init__(self, rows: Float[Tensor, "rank size"]) -> None:
        self._rows = rows
        self._solver = DenseSolver(symmetric_product(rows))
        self.trace = self._solver.trace

    def __call__(self, v: Float[Tensor, " size"], damping: float) -> Float[Tensor, " size"]:
        """Returns M⁻¹v, up to a factor."""
        damping = max(damping, self.floor * self.trace)
        return v - self._rows.T @ self._solver(self._rows @ v, damping)


def pcg(
    product: Product,
    rhs: Float[Tensor, " size"],
    damping: float,
    precondition: Product,
    *,
    tolerance: float,
    limit: int,
) -> Solution:
    """Solves (A + λI)x = b by preconditioned conjugate gradients, to a relative residual or as far as iterations go.

    One product with A an iteration. The error in the result is computed from A itself, not from the recurrence.
    """
    norm = torch.linalg.vector_norm(rhs).item()
    if norm == 0:
        return Solution(torch.zeros_like(rhs), 0.0)
    solution, residual = torch.zeros_like(rhs), rhs.clone()
    direction = precondition(residual)
    inner = residual @ direction
    steps = 0
    while steps < limit and torch.linalg.vector_norm(residual).item() > tolerance * norm:
        image = product(direction) + damping * direction
        curvature = (direction @ image).item()
        if not 0 < curvature < math.inf:
            break  # the matrix is no longer definite to rounding: what is there is the best to be had
        length = inner / curvature
        solution, residual = solution + length * direction, residual - length * image
        preconditioned = precondition(residual)
        previous, inner = inner, residual @ preconditioned
        direction = preconditioned + inner / previous * direction
        steps += 1
    left = rhs - product(solution) - damping * solution
    return Solution(solution, torch.linalg.vector_norm(left).item() / norm, steps)


def symmetric_product(rows: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows rows"]:
    """A Aᵀ at 5/8 of its cost: blocks on and above the diagonal, the others copied."""
    count = len(rows)
    if count < 64 * SYMMETRIC_BLOCKS:
        return rows @ rows.T
    result = rows.new_empty(count, count)
    bounds = [count * k // SYMMETRIC_BLOCKS for k in range(SYMMETRIC_BLOCKS + 1)]
    for start, stop in pairwise(bounds):
        strip = rows[start:stop] @ rows[start:].T
        result[start:stop, start:] = strip
        result[stop:, start:stop] = strip[:, stop - start :].T
    return result


def _shifted(gram: Tensor, damping: float) -> Tensor:
    shifted = gram.clone()
    shifted.diagonal().add_(damping)
    return shifted


def _nearly_singular(factor: Tensor) -> bool:
    """Whether a Cholesky factor's diagonal says that rounding alone made the matrix definite."""
    diagonal = factor.diagonal().square()
    return bool(diagonal.min() <= len(factor) * torch.finfo(factor.dtype).eps * diagonal.max())
