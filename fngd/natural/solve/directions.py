"""The mathematics of a step of NGD, as pure functions: from Gram matrices to directions.

symbol    meaning                                                                      shape
g         the layer's gradient of the training loss                                    [N]
U         the samples' own gradients as columns; K = UᵀU                               [N, B], [B, B]
V         the same for labels that the model has drawn (true Fisher matrix F = VVᵀ/B)  [N, B]
s         gradient of the whole training loss on which `backward` is called, over B·g for a mean
λ, α      damping; λ = α‖K‖_F, with V: α‖VᵀV‖_F
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fngd.coefficients import smw_coefficients
from persample import LayerGrads

Pair = tuple[Tensor | None, Tensor | None]
"""(weight, bias) of a layer; None for one that needs no gradient."""


def coefficient_factors(
    gram: Float[Tensor, "batch batch"],
    *,
    alpha: float | None,
    damping: float | None,
    scale: str,
    reduction: str,
    rhs: Float[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, " batch"], Tensor]:
    """Returns (factors B·c_b on each sample's share of the plain gradient, whether they are finite).

    The plain gradient is Σ_b g_b/B for a mean, Σ_b g_b for a sum; with d = U c (see `fngd.coefficients`) the
    preconditioned one is Σ_b (B·c_b) times the same shares. `gram` is the one of those shares.
    Where a coefficient is NaN or inf all factors are 1 (the plain gradient).
    """
    batch = gram.shape[-1]
    own = gram * batch**2 if reduction == "mean" else gram  # the Gram matrix of the samples' own gradients
    factors = batch * smw_coefficients(own, alpha=alpha, damping=damping, scale=scale, rhs=rhs)
    good = factors.isfinite().all()
    return torch.where(good, factors, 1.0), good


def relative_damping(gram: Float[Tensor, "batch batch"], alpha: float | None, damping: float | None) -> Tensor:
    """Returns λ = α‖K‖_F, or the absolute damping, in float64."""
    gram = gram.double()
    return torch.linalg.matrix_norm(gram) * alpha if damping is None else gram.new_tensor(damping)


def true_fisher_weights(
    gram: Float[Tensor, "batch batch"],
    products: Float[Tensor, " batch"],
    *,
    alpha: float | None,
    damping: float | None,
    scale: str,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, ""], Tensor]:
    """Returns (w, ν, whether they are finite) of the direction d = ν(g − V w) of the true Fisher matrix.

        (λI + VVᵀ/B)⁻¹ g = (1/λ)(g − V (VᵀV + λB·I)⁻¹ Vᵀg)    (Sherman–Morrison–Woodbury)

    so w = (VᵀV + λB·I)⁻¹ Vᵀg; ν is 1/λ with scale="per_layer" and 1 with "absorb". `gram` is VᵀV, `products` Vᵀg.
    Where V = 0 the direction is g.

    >>> v, g = torch.eye(2), torch.tensor([1.0, 2.0])
    >>> w, nu, good = true_fisher_weights(v.T @ v, v.T @ g, alpha=None, damping=0.5, scale="per_layer")
    >>> nu * (g - v @ w)  # ½I + ½I = I
    tensor([1., 2.])
    """
    absorbed = smw_coefficients(gram, alpha=alpha, damping=damping, scale="absorb", rhs=products)
    lam = relative_damping(gram, alpha, damping)
    safe = torch.where(lam > 0, lam, 1)
    weights = absorbed / safe.to(absorbed.dtype)
    nu = 1 / safe if scale == "per_layer" else torch.ones_like(safe)
    good = weights.isfinite().all() & nu.isfinite()
    return torch.where(good, weights, 0.0), torch.where(good, nu, 1.0).to(absorbed.dtype), good


def curved(
    plain: Mapping[str, Pair],
    samples: Mapping[str, LayerGrads],
    own: float | Tensor,
    gram: Float[Tensor, "batch batch"],
    *,
    scale: str,
    alpha: float | None,
    damping: float | None,
) -> dict[str, tuple[Pair, Pair]]:
    """Returns (d, g) of each layer, d = ν(g − V w) as in `true_fisher_weights`, layers of one Gram matrix together.

    Arguments:
        plain: g.
        samples: whose gradients, times `own` (one number for each sample, or for all), are V.
        gram: VᵀV, of all layers.
    """
    products = torch.stack([inner_products(samples[path], plain[path]) for path in samples]).sum(0) * own
    weights, nu, good = true_fisher_weights(gram, products.to(gram.dtype), scale=scale, alpha=alpha, damping=damping)
    pairs = {}
    for path, g in plain.items():
        d = scaled(combined(g, samples[path].weighted_sum(weights * own), -1.0), nu)
        # Where the samples' gradients are not finite, 0 times them is neither.
        weight, bias = (None if a is None or b is None else torch.where(good, a, b) for a, b in zip(d, g, strict=True))
        pairs[path] = (weight, bias), g
    return pairs


def inner_products(grads: LayerGrads, vector: Sequence[Tensor | None]) -> Float[Tensor, " batch"]:
    """Returns ⟨g_b, v⟩ for v a pair (weight, bias) of the layer; at the cost of one weight gradient.

    It is the transpose of the weighted sum c ↦ Σ_b c_b g_b, which autograd knows for every kind of layer.
    """
    known = [part for part in vector if part is not None]
    with torch.enable_grad():
        c = torch.ones(grads.batch_size, dtype=known[0].dtype, device=grads.device, requires_grad=True)
        parts = grads.weighted_sum(c)
        pairs = [(p, v) for p, v in zip(parts, vector, strict=True) if p is not None and v is not None]
        outputs, vectors = [p for p, _ in pairs], [v.to(p.dtype) for p, v in pairs]
        (result,) = torch.autograd.grad(outputs, c, vectors)
    return result


def dot(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Tensor:
    """Returns ⟨first, second⟩ of the gradients of weight and bias together."""
    parts = [(a * b).sum() for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return torch.stack(parts).sum()


def scaled(pair: Pair, factor: Tensor) -> Pair:
    """Returns a pair times a number."""
    weight, bias = pair
    return (
        None if weight is None else weight * factor.to(weight.dtype),
        None if bias is None else bias * factor.to(bias.dtype),
    )


def combined(first: Pair, second: Pair, factor: float | Tensor = 1.0) -> Pair:
    """Returns first + factor·second."""
    one, two = (None if a is None or b is None else a + factor * b for a, b in zip(first, second, strict=True))
    return one, two


def squared_lengths(output_grad: Tensor | None, axis: int, batch: int) -> Float[Tensor, " batch"]:
    """‖∂ℓ_b/∂output‖² by sample, of the shares of the training loss: the right-hand side of fisher="improved".

    Raises:
        ValueError: the gradient was not seen, or has no `batch` samples on the axis.
    """
    if output_grad is None or output_grad.dim() <= axis or output_grad.shape[axis] != batch:
        found = "none was seen" if output_grad is None else f"it has shape {list(output_grad.shape)}"
        raise ValueError(
            f"fisher='improved' needs the gradient at the model's output, with {batch} samples on axis {axis}, "
            f"but {found}. Call the model itself, compute the loss from what it returns, and give output_axis= "
            "if samples are on another axis."
        )
    rows = output_grad.movedim(axis, 0).flatten(1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum(1)
