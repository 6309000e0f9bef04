"""The coefficients of a natural-gradient step: from a Gram matrix to one weight per sample.

    symbol            meaning                                                     shape
    B (paper: M)      samples in the batch
    g_b               gradient of sample b's own loss w.r.t. one layer            [N]
    U                 the g_b as columns                                          [N, B]
    K = UᵀU           Gram matrix ("correlation matrix")                          [B, B]
    g = U·1/B         mean gradient                                               [N]
    λ, α              damping; λ = α‖K‖_F (equation 14 of the FNGD paper)
    c                 coefficients; the direction is d = U c                      [B]

The empirical Fisher matrix of a layer is F = UUᵀ/B. By Sherman–Morrison–Woodbury the paper's equation 9 is

    (λI + UUᵀ/B)⁻¹ g = 1/(λB) · U (1 − (λI + K/B)⁻¹ Uᵀg),    with Uᵀg = K·1/B,

and by the push-through identity it collapses to

    d = U c,    c = (K + λB·I)⁻¹ 1,

one symmetric positive definite B × B system; nothing of size N is needed to get c once K is known.

Where the paper can be read in several ways:

- Damping. Equation 9 damps K/B, the text of Section IV-D writes (λI + UᵀU)⁻¹, and equation 14 takes the
  norm of K = UᵀU, not of K/B. This module follows equation 9 with λ of equation 14. Then ‖K‖₂/(λB) ≤
  1/(αB), so that |B·c̃_b − 1| = O(1/(αB)): α ≥ 1 is SGD to three digits at B = 128, and what deserves the
  name natural gradient has α well under 1/B.
- Scale. Section IV-D folds 1/λ into the learning rate: `absorb` gives c̃ = λ(K + λB·I)⁻¹ 1, which tends to
  1/B (SGD) for heavy damping and does not change with the scale of the loss. `per_layer` keeps 1/λ: every
  layer has its own adaptive step, and K must then be that of the true, unscaled g_b.
- K = 0 (every gradient vanishes) makes λ = 0. Any c gives the step 0 then; the answer here is 1/B, no NaN.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

SCALES = ("absorb", "per_layer")


def smw_coefficients(
    gram: Float[Tensor, "*layers batch batch"],
    *,
    alpha: float | None = None,
    damping: float | None = None,
    scale: str = "absorb",
    rhs: Float[Tensor, "*layers batch"] | None = None,
) -> Float[Tensor, "*layers batch"]:
    """Returns the coefficients c of the damped natural-gradient direction d = U c.

        c = (K + λB·I)⁻¹ 1, times λ if scale is "absorb"    (FNGD paper, equations 9 and 14; see the module)

    Arguments:
        gram: K = UᵀU, symmetric positive semi-definite; any number of matrices in front.
        alpha: relative damping α > 0, λ = α‖K‖_F for each matrix. math.inf is allowed with "absorb": c = 1/B.
        damping: absolute damping λ > 0, instead of alpha.
        scale: "absorb" or "per_layer".
        rhs: s in c = (K + λB·I)⁻¹ s, instead of 1; s_b = ‖∂ℓ_b/∂logits‖² is the improved empirical Fisher
            matrix's (iEF; Wu et al. 2024).

    Raises:
        ValueError: not exactly one of alpha and damping, one out of range, an unknown scale, K not square, s of
            another shape than K's rows.

    Exact up to rounding. Solved in float64 whatever K's precision and returned in K's (float32 for half). A
    K that rounding made indefinite is lifted by its own rounding error; one that is indefinite beyond that
    gives s/B. NaN or inf in K or s gives NaN. Nothing waits for the device.

    >>> smw_coefficients(torch.eye(4), alpha=0.5)  # orthogonal gradients: all samples count the same
    tensor([0.2000, 0.2000, 0.2000, 0.2000])
    """
    check_damping(alpha, damping, scale)
    if not isinstance(gram, Tensor) or not gram.is_floating_point():
        got = gram.dtype if isinstance(gram, Tensor) else type(gram).__name__
        raise TypeError(f"gram must be a tensor of real floating-point numbers, [..., B, B]; got {got}")
    batch = gram.shape[-1] if gram.dim() >= 2 else 0
    if gram.dim() < 2 or gram.shape[-2] != batch or not batch:
        raise ValueError(f"gram has shape {list(gram.shape)}; it must be [..., B, B] with B ≥ 1")
    if rhs is not None and rhs.shape != gram.shape[:-1]:
        raise ValueError(f"rhs has shape {list(rhs.shape)}; with this gram it must be {list(gram.shape[:-1])}")
    eps = torch.finfo(gram.dtype).eps
    dtype = torch.float32 if gram.element_size() < 4 else gram.dtype
    narrow = gram.element_size() < 8
    gram = gram.double()
    right = gram.new_ones(gram.shape[:-1]) if rhs is None else rhs.double()
    # Everything relative to ‖K‖_F; squares of small entries would vanish, but not where they came from float32.
    unit, largest = (gram, 1.0) if narrow else _normalised(gram)
    norm = torch.linalg.matrix_norm(unit, keepdim=True)
    vanished = norm == 0
    positive = norm.masked_fill(vanished, 1)
    relative: Tensor | float = damping / (positive * largest) if damping is not None else alpha or 0.0
    # c̃ = (K/λ + B·I)⁻¹ 1: no eigenvalue below B, condition number at most 1 + 1/(αB).
    absorbed = _solve(unit / (positive * relative), eps / relative, right)
    absorbed = absorbed + 0 * norm.squeeze(-1)  # NaN must not be hidden by a fallback
    if scale == "absorb":
        return absorbed.to(dtype)
    lam = torch.where(vanished, 1.0 if damping is None else damping, relative * positive * largest)
    return (absorbed / lam.squeeze(-1)).to(dtype)


def is_number(value: Any) -> bool:
    """Whether the value is a real number, NumPy's and tensors included; True and False are none."""
    return isinstance(value, Real | Tensor) and not isinstance(value, bool)


def check_damping(alpha: float | None, damping: float | None, scale: str) -> None:
    """Raises ValueError unless one of alpha and damping is given and positive and the scale is known."""
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; choose one of {list(SCALES)}")
    given: dict[str, Any] = {name: x for name, x in (("alpha", alpha), ("damping", damping)) if x is not None}
    if len(given) != 1:
        raise ValueError(
            f"got alpha={alpha} and damping={damping}; give exactly one: alpha (relative, λ = α‖K‖_F) or "
            "damping (λ itself); with damping=, alpha=None"
        )
    for name, value in given.items():
        if not is_number(value) or not value > 0:  # also catches NaN
            raise ValueError(f"{name}={value!r}; it must be > 0 (a good start is alpha=1e-2; 1 is nearly plain SGD)")
        if math.isinf(value) and scale == "per_layer":
            raise ValueError(f"{name}=inf with scale='per_layer' makes every step 0; use scale='absorb' for plain SGD")


def _normalised(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(K over its largest entry, that entry; 1 for K = 0)."""
    largest = gram.abs().amax((-2, -1), keepdim=True)
    largest = largest.masked_fill(largest == 0, 1)
    return gram / largest, largest


def _solve(matrix: Tensor, rounding: Tensor | float, rhs: Tensor) -> Tensor:
    """(matrix + B·I)⁻¹ s by Cholesky, in place; `rounding` is the size of the errors that the matrix may carry."""
    batch, right = matrix.shape[-1], rhs.unsqueeze(-1)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(batch)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    result = torch.cholesky_solve(right, factor)
    # On the CPU a look at `failed` is free; on an accelerator it would wait, so there both are computed.
    if matrix.device.type != "cpu" or failed.any():
        diagonal.add_(batch * (rounding.squeeze(-1) if isinstance(rounding, Tensor) else rounding))
        factor, failed_again = torch.linalg.cholesky_ex(matrix)
        lifted = torch.cholesky_solve(right, factor)
        lifted = torch.where(failed_again[..., None, None] == 0, lifted, right / batch)
        result = torch.where(failed[..., None, None] == 0, result, lifted)
    return result.squeeze(-1)
