"""KFAC: the Fisher matrix of a layer as a Kronecker product of two small ones.

    symbol     meaning                                                                 shape
    N, T, R    samples, positions in a sample, R = N·T                                 (see `statistics`)
    A          (1/N) Σ_bt x_bt x_btᵀ, of inputs or patches, 1 appended for the bias    [inp, inp]
    G          (1/R) Σ_bt (N z_bt)(N z_bt)ᵀ, of the output gradients of own losses     [out, out]
    Q_A, d_A   eigenvectors and eigenvalues of A; Q_G, d_G of G
    g, v       the layer's gradient and direction                                      [out, inp]
    γ, π       damping, and its split between A and G

A ⊗ G is the Fisher matrix of the layer if x and z, and different positions, are independent (Martens and Grosse
2015 for T = 1; Grosse and Martens 2016, KFC, for convolutions, whose Ω and Γ these are). Positions of a linear
layer are treated as those of a convolution. A convolution with groups has a pair of factors for each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from fngd.kronecker.base import LayerPreconditioned
from fngd.kronecker.method import Method, State
from fngd.kronecker.options import LayerOptions
from fngd.kronecker.processes import Found, Ranks, joined_sums
from fngd.kronecker.statistics import (
    Factors,
    Statistics,
    added,
    moving_average,
    own_scale,
    position_count,
    sample_count,
    second_moments,
)
from fngd.optim.checks import showing
from fngd.optim.presets import with_presets

INVERSES = ("eigen", "cholesky")
PRESETS: dict[str | None, dict[str, Any]] = {
    None: {},
    "kfac-pytorch": {"damping": 1e-3, "average": 0.95, "statistics_every": 1, "inverse_every": 1, "kl_clip": 1e-3},
}


def kfac_factors(
    statistics: Statistics, reduction: str, preset: str | None = None
) -> tuple[Float[Tensor, "groups inp inp"], Float[Tensor, "groups out out"]]:
    """Returns (A, G) of the statistics' sums of squares.

        A = (1/N) Σ x xᵀ,    G = (s²/R) Σ z zᵀ,    s = N for a mean loss, 1 for a sum    (KFC, Section 3)

    With preset="kfac-pytorch" what that library computes: A = (1/(R·P²)) Σ x xᵀ and G = (1/(R·P²)) Σ z zᵀ with
    P = T in a convolution and 1 in a linear layer, and z as it is, 1/N of the own gradient under a mean.
    """
    samples, rows = statistics.samples, statistics.rows
    if preset is None:
        scale = own_scale(reduction, samples)
        return statistics.inputs / samples, statistics.outputs * (scale**2 / rows)
    spatial = rows / samples if statistics.convolution else 1.0
    return statistics.inputs / (rows * spatial**2), statistics.outputs / (rows * spatial**2)


def symmetric_eigen(
    matrix: Float[Tensor, "*batch n n"],
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n n"]]:
    """Returns (eigenvalues, at least 0; eigenvectors as columns) of a positive semi-definite matrix.

    In the matrix's precision, and again in float64 where the iteration fails to converge. Waits for the device.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # repeated eigenvalues can defeat float32
        values, vectors = (part.to(matrix.dtype) for part in torch.linalg.eigh(matrix.double()))
    return values.clamp_min(0), vectors


def eigen_direction(
    grad: Float[Tensor, "*groups out inp"],
    eigen_a: tuple[Tensor, Tensor],
    eigen_g: tuple[Tensor, Tensor],
    damping: float | Tensor,
) -> Float[Tensor, "*groups out inp"]:
    """Returns the direction v = (A ⊗ G + γI)⁻¹ g by the eigenvalues and eigenvectors of A and G.

        v = Q_G [(Q_Gᵀ g Q_A) / (d_G d_Aᵀ + γ)] Q_Aᵀ    (Grosse and Martens 2016, Appendix B)

    >>> one = torch.ones(1), torch.ones(1, 1)
    >>> eigen_direction(torch.tensor([[3.0]]), one, one, damping=0.5)
    tensor([[2.]])
    """
    (d_a, q_a), (d_g, q_g) = eigen_a, eigen_g
    rotated = q_g.mT @ grad @ q_a
    return q_g @ (rotated / (d_g.unsqueeze(-1) * d_a.unsqueeze(-2) + damping)) @ q_a.mT


def damped_inverses(
    a: Float[Tensor, "*groups inp inp"], g: Float[Tensor, "*groups out out"], damping: float | Tensor
) -> tuple[Float[Tensor, "*groups inp inp"], Float[Tensor, "*groups out out"]]:
    """Returns ((A + π√γ·I)⁻¹, (G + √γ/π·I)⁻¹), by Cholesky in float64.

    π = √((tr A / inp) / (tr G / out))    (Martens and Grosse 2015, Section 6.3); 1 where a trace is 0
    """
    mean_a, mean_g = (matrix.diagonal(dim1=-2, dim2=-1).mean(-1).double() for matrix in (a, g))
    pi = torch.where((mean_a > 0) & (mean_g > 0), (mean_a / mean_g).sqrt(), 1.0)
    root = damping**0.5
    return damped_inverse(a, root * pi), damped_inverse(g, root / pi)


def damped_inverse(matrix: Float[Tensor, "*groups n n"], damping: Any) -> Float[Tensor, "*groups n n"]:
    """Returns (M + γI)⁻¹ by Cholesky in float64, in M's precision; `damping`: a number, or one for each matrix.

    I/γ where rounding has made M + γI indefinite. Nothing waits for the device.
    """
    eye = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    damping = on_device(damping, eye)[..., None, None]
    factor, failed = torch.linalg.cholesky_ex(matrix.double() + damping * eye)
    good = (failed == 0)[..., None, None]
    return torch.where(good, torch.cholesky_inverse(torch.where(good, factor, eye)), eye / damping).to(matrix.dtype)


def on_device(value: float | Tensor, like: Tensor) -> Tensor:
    """Returns the value as a tensor in the precision and on the device of `like`, without waiting for the device."""
    if isinstance(value, Tensor):
        return value.to(like)
    return torch.full((), value, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class KroneckerFactors(Method):
    """KFAC's part of a step; see `fngd.kronecker.method.Method`."""

    average: float
    inverse: str
    preset: str | None

    def collect(self, factors: Factors, *, bias: bool, convolution: bool, random: torch.Generator) -> Statistics:
        """Returns Σ x xᵀ and Σ z zᵀ."""
        samples = sample_count(factors)
        inputs, outputs = second_moments(factors, bias=bias, convolution=convolution)
        return Statistics(inputs, outputs, samples, samples * position_count(factors), convolution)

    def combine(self, first: Statistics, second: Statistics) -> Statistics:
        """Returns the sums over both batches."""
        return added(first, second)

    def joined(self, found: Found, ranks: Ranks) -> dict[str, Statistics]:
        """Returns the sums over all processes."""
        return joined_sums(found, ranks, moments=True)

    def update(self, old: State | None, new: Statistics, reduction: str) -> State:
        """Returns the moving averages of A ("inputs") and G ("outputs")."""
        good = new.finite()
        factors = dict(zip(("inputs", "outputs"), kfac_factors(new, reduction, self.preset), strict=True))
        if old is None:
            old = {"count": torch.zeros((), dtype=torch.long, device=good.device)}
            if self.preset is not None:  # starts from I, as if that were the first of many statistics
                old |= {name: _identity_like(factor) for name, factor in factors.items()}
        if self.preset is None:
            averages = {
                name: moving_average(old.get(name), factor, old["count"], good, self.average)
                for name, factor in factors.items()
            }
        else:
            averages = {
                name: torch.where(good, self.average * old[name] + (1 - self.average) * factor, old[name])
                for name, factor in factors.items()
            }
        return {**averages, "count": old["count"] + good}

    def invert(self, running: State, damping: float, before: State | None) -> State:
        """Returns eigenvalues and eigenvectors, or damped inverses."""
        a, g = running["inputs"], running["outputs"]
        if self.inverse == "cholesky":
            return dict(zip(("inverse_a", "inverse_g"), damped_inverses(a, g, damping), strict=True))
        (d_a, q_a), (d_g, q_g) = symmetric_eigen(a), symmetric_eigen(g)
        return {"d_a": d_a, "q_a": q_a, "d_g": d_g, "q_g": q_g}

    def direction(self, inverse: State, grad: Float[Tensor, "groups out inp"], damping: float) -> Tensor:
        """Returns v."""
        if self.inverse == "cholesky":
            return inverse["inverse_g"] @ grad @ inverse["inverse_a"]
        eigen_a, eigen_g = (inverse["d_a"], inverse["q_a"]), (inverse["d_g"], inverse["q_g"])
        return eigen_direction(grad, eigen_a, eigen_g, damping)


def _identity_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)


class KFAC(LayerPreconditioned):
    """Kronecker-factored approximate curvature; a `torch.optim.Optimizer` for the ordinary training loop.

        v = (A ⊗ G + γI)⁻¹ g = Q_G [(Q_Gᵀ g Q_A) / (d_G d_Aᵀ + γ)] Q_Aᵀ,    θ ← SGD(θ, ν·v)

    for every linear and (not transposed) convolution layer, weight and bias together (Martens and Grosse 2015;
    Grosse and Martens 2016; symbols: `fngd.kronecker.kfac`). The other parameters get the plain gradient.
    ν = min(1, √(κ / Σ_l lr²⟨v_l, g_l⟩)) with the learning rate of the step (the KL clip).

    Arguments:
        model: the model; its gradients stay the ordinary ones.
        params: parameters or parameter groups, as for any optimiser; default: all of the model's. A group may
            have its own lr, momentum, nesterov, weight_decay, decoupled_weight_decay, damping,
            precondition (False: the plain gradient) and rule ("sgd" or "adamw").
        lr, momentum, nesterov, weight_decay: as in `torch.optim.SGD`, ≥ 0.
        decoupled_weight_decay: shrink the parameters by lr·weight_decay instead of adding to the direction.
        damping: γ > 0, in the units of A ⊗ G, that is of a squared gradient of a sample's own loss. The default
            trains where 1e-3, usual with the preset's smaller factors, can diverge on stale factors.
        average: weight of the old factors in the moving average, 0 ≤ average < 1; min(1 − 1/k, average) in
            the k-th.
        statistics_every: steps between updates of A and G, ≥ 1.
        inverse_every: steps between decompositions, ≥ 1.
        inverse: "eigen", or "cholesky" for (G + √γ/π·I)⁻¹ g (A + π√γ·I)⁻¹.
        kl_clip: κ > 0, or None for no clip.
        reduction: how the training loss is reduced over the batch, "mean" or "sum".
        curvature_samples: how many samples of each backward pass the factors are made of, the first ones, ≥ 1 (a
            smaller batch for curvature than for the gradient: Ren and Goldfarb 2019); None: all.
        other: "sgd" or "adamw", for the parameters that are not preconditioned; with "adamw" they are in
            parameter groups of their own, with options `other_options` (lr, betas, eps, weight_decay).
        scaler: the `torch.amp.GradScaler` that scales the loss, if one does, so that G is that of the true loss.
        preset: "kfac-pytorch" for that library's step: factors divided by the square of the number of pixels in a
            convolution, G from the gradient of the mean loss, averages that start from I, and its defaults where none
            are given: damping=1e-3, which is not comparable with the γ above, average=.95, kl_clip=1e-3, and
            statistics and decompositions in every step.
        process_group: the processes whose samples make one batch, where torch.distributed is initialised; default:
            all. Factors are theirs together (see `fngd.kronecker.processes`), gradients are as DDP or FSDP2 deliver
            them.
        divide_inverses: each process inverts its share of the layers and sends the others what it has found, in place
            of each inverting all; `bytes_sent` counts it. For large factors and fast connections.
        batch_axis: see `persample.reweight`.
        functions: the projections of `nn.MultiheadAttention` and parameters in products with data (`F.linear`, `x @ w`,
            `torch.addmm`, `F.conv2d`, …) count as layers; as for `NGD`.

    Raises:
        ValueError: an argument out of range, or a model that is reweighted already.

    Approximate: the empirical Fisher matrix, block-diagonal by layer, each block a Kronecker product; factors
    and inverses of earlier steps. With gradient accumulation the factors are those of the joined batch, if the
    losses add up to its loss; a pass for another model's loss (a GAN's generator's) does not count if the model's
    zero_grad() clears its gradients. A batch with inf or NaN leaves the factors as they were. Weights that several
    layers or an embedding share and transposed convolutions get the plain gradient: see `explain()`.

    >>> model = nn.Linear(3, 1)
    >>> opt = KFAC(model, lr=0.1, statistics_every=10, inverse_every=100)
    >>> model(torch.randn(8, 3)).square().mean().backward()
    >>> opt.step()
    >>> opt.zero_grad()
    """

    @showing(LayerPreconditioned.__init__)
    @with_presets(PRESETS)
    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        average: float = 0.95,
        statistics_every: int = 1,
        inverse_every: int = 10,
        inverse: str = "eigen",
        preset: str | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        if inverse not in INVERSES:
            raise ValueError(f"inverse={inverse!r} is unknown; choose one of {list(INVERSES)}")
        method = KroneckerFactors(average, inverse, preset)
        super().__init__(model, params, method, statistics_every, inverse_every, **options)
