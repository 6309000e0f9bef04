"""Solving (K + λI) a = s in sample space: dense where K fits, by a randomised sketch and conjugate gradients else.

    symbol    meaning                                                          shape
    K         Gram matrix of the residuals' Jacobian, J Jᵀ                     [B, B]
    Ω         random test matrix with orthonormal columns                      [B, ℓ]
    Y         the sketch, K Ω                                                  [B, ℓ]
    U, σ      eigenvectors and -values of Nyström's Y (Ωᵀ Y)⁻¹ Yᵀ ≈ K          [B, ℓ], [ℓ]

Sources: Frangella, Tropp, Udell, "Randomized Nyström preconditioning" (2023), algorithms 2.1 and 5.1; Halko,
Martinsson, Tropp (2011) for the sketch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""v -> K v, for v [B]."""


@dataclass(frozen=True)
class Solution:
    """Coefficients a, how they were found, and the relative residual ‖(K + λI)a − s‖/‖s‖ that is left."""

    coefficients: Float[Tensor, " batch"]
    method: str
    error: float
    iterations: int = 0


@dataclass(frozen=True)
class Sketch:
    """Nyström's approximation U diag(σ) Uᵀ of K, the largest σ first."""

    vectors: Float[Tensor, "batch rank"]
    values: Float[Tensor, " rank"]


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


def nystrom(
    product: Callable[[Tensor], Tensor],
    batch: int,
    rank: int,
    generator: torch.Generator,
    device: torch.device | None = None,
) -> Sketch:
    """Returns Nyström's approximation of K of a rank from `rank` products with orthonormal random vectors.

    Arguments:
        product: V [B, ℓ] -> K V, in float64 or less.
        generator: on the CPU, so that every device draws the same.

    Error: E‖K − K̂‖ ≤ (1 + 2k/(ℓ−k−1)) σ_(k+1) + 2e²ℓ/((ℓ−k)² − 1) Σ_(j>k) σ_j for every k ≤ ℓ − 2 (Frangella et
    al., proposition 2.2): small where K's eigenvalues decay fast, as those of smooth networks' Jacobians do. `pcg`
    corrects what is left of it.
    """
    test = torch.randn(batch, rank, generator=generator, dtype=torch.float64)
    test = torch.linalg.qr(test.to(device))[0]
    sketch = product(test).double()
    if not bool(sketch.isfinite().all()):
        raise ValueError("K has entries that are not finite: a derivative of the residuals is infinite or NaN")
    shift = torch.finfo(sketch.dtype).eps * torch.linalg.matrix_norm(sketch)  # makes ΩᵀY safely definite
    sketch = sketch + shift * test
    core = test.T @ sketch
    factor, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
    if failed.item():  # K = 0, or noise: no approximation, and conjugate gradients have all the work
        return Sketch(test, torch.zeros(rank, dtype=torch.float64, device=test.device))
    half = torch.linalg.solve_triangular(factor, sketch.T, upper=False).T  # Y F⁻ᵀ, with F Fᵀ = ΩᵀY
    vectors, singular, _ = torch.linalg.svd(half, full_matrices=False)
    return Sketch(vectors, (singular.square() - shift).clamp_min(0))


def pcg(
    product: Product, rhs: Float[Tensor, " batch"], damping: float, sketch: Sketch, *, tolerance: float, limit: int
) -> Solution:
    """Solves (K + λI) a = s by conjugate gradients, preconditioned with the sketch, to a relative residual.

    One product with K an iteration; few are needed where the sketch holds the eigenvalues above λ. The error in the
    result is computed from K itself, not from the recurrence.
    """
    rhs = rhs.double()
    norm = torch.linalg.vector_norm(rhs).item()
    if norm == 0:
        return Solution(torch.zeros_like(rhs), "nystrom", 0.0)
    last = sketch.values[-1]
    weights = (last + damping) / (sketch.values + damping).clamp_min(torch.finfo(torch.float64).tiny) - 1

    def precondition(v: Tensor) -> Tensor:
        return v + sketch.vectors @ (weights * (sketch.vectors.T @ v))

    solution, residual = torch.zeros_like(rhs), rhs.clone()
    direction = precondition(residual)
    inner = residual @ direction
    steps = 0
    while steps < limit and torch.linalg.vector_norm(residual).item() > tolerance * norm:
        image = product(direction).double() + damping * direction
        curvature = (direction @ image).item()
        if not 0 < curvature < math.inf:
            break  # K is no longer definite to rounding: what is there is the best to be had
        length = inner / curvature
        solution, residual = solution + length * direction, residual - length * image
        preconditioned = precondition(residual)
        previous, inner = inner, residual @ preconditioned
        direction = preconditioned + inner / previous * direction
        steps += 1
    left = rhs - product(solution).double() - damping * solution
    return Solution(solution, "nystrom", torch.linalg.vector_norm(left).item() / norm, steps)


def _shifted(gram: Tensor, damping: float) -> Tensor:
    shifted = gram.clone()
    shifted.diagonal().add_(damping)
    return shifted


def _nearly_singular(factor: Tensor) -> bool:
    """Whether a Cholesky factor's diagonal says that rounding alone made the matrix definite."""
    diagonal = factor.diagonal().square()
    return bool(diagonal.min() <= len(factor) * torch.finfo(factor.dtype).eps * diagonal.max())
