"""EKFAC: KFAC's eigenvectors, and in their basis the second moments that the gradients really have.

    symbol     meaning                                                                 shape
    Q_A, Q_G   eigenvectors of KFAC's A and G                                          (see `fngd.kronecker.kfac`)
    g_b        gradient of sample b's own loss, Σ_t (N z_bt) x_btᵀ                     [out, inp]
    S          running mean over samples of (Q_Gᵀ g_b Q_A)², entry by entry            [out, inp]
    g, v, γ    the layer's gradient, direction, damping

KFAC's own moments in that basis are d_G d_Aᵀ, which holds if x and z are independent. S is exact: of all matrices with
these eigenvectors, Q diag(S) Qᵀ is nearest to the Fisher matrix in the Frobenius norm (George et al. 2018, Section 3).

The basis is renewed every `inverse_every` steps. S is then carried over, S' = diag(Rᵀ diag(S) R) with R the rotation
from the old basis into the new one, S'_ij = Σ_kl (Q_GᵀQ'_G)²_ki S_kl (Q_AᵀQ'_A)²_lj, and goes on as a moving average.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from fngd.kronecker.base import LayerPreconditioned
from fngd.kronecker.kfac import KroneckerFactors, symmetric_eigen
from fngd.kronecker.method import State, Step
from fngd.kronecker.options import LayerOptions
from fngd.kronecker.processes import Found, Ranks
from fngd.kronecker.statistics import Factors, Kept, Statistics, moving_average, own_scale
from fngd.optim.checks import showing

CHUNK = 2**22
"""Numbers of per-sample gradients that are formed at a time."""


def rotated_moments(
    kept: Kept, q_a: Float[Tensor, "groups inp inp"], q_g: Float[Tensor, "groups out out"]
) -> Float[Tensor, "groups out inp"]:
    """Returns Σ_b (Q_Gᵀ g_b Q_A)², entry by entry, of g_b = Σ_t z_bt x_btᵀ; no g_b is formed for single positions."""
    result = q_a.new_zeros(len(q_a), q_g.shape[-1], q_a.shape[-1])
    for x, z in kept.chunks(CHUNK):
        x, z = x.to(q_a) @ q_a.unsqueeze(1), z.to(q_g) @ q_g.unsqueeze(1)
        if x.shape[2] == 1:
            result.baddbmm_(z.squeeze(2).square().mT, x.squeeze(2).square())
        else:
            result += (z.mT @ x).square().sum(1)
    return result


def scaled_direction(
    grad: Float[Tensor, "groups out inp"], q_a: Tensor, q_g: Tensor, scales: Tensor, damping: float | Tensor
) -> Float[Tensor, "groups out inp"]:
    """Returns the direction v = Q_G [(Q_Gᵀ g Q_A) / (S + γ)] Q_Aᵀ (George et al. 2018, Algorithm 1).

    >>> one = torch.ones(1, 1, 1)
    >>> scaled_direction(torch.tensor([[[3.0]]]), one, one, scales=one, damping=0.5)
    tensor([[[2.]]])
    """
    return q_g @ ((q_g.mT @ grad @ q_a) / (scales + damping)) @ q_a.mT


@dataclass(frozen=True)
class EigenbasisMoments(KroneckerFactors):
    """EKFAC's part of a step; see `fngd.kronecker.method.Method`. Factors are KFAC's."""

    def collect(self, factors: Factors, *, bias: bool, convolution: bool, random: torch.Generator) -> Statistics:
        """Returns Σ x xᵀ and Σ z zᵀ, and keeps x and z until the step, when the basis is known."""
        found = super().collect(factors, bias=bias, convolution=convolution, random=random)
        return replace(found, kept=(Kept(factors, bias),))

    def joined(self, found: Found, ranks: Ranks) -> dict[str, Statistics]:
        """Returns the sums over all processes; what is kept stays where it is."""
        sums = super().joined(found, ranks)
        return {
            layer: replace(each, kept=_in_own_scale(found[layer], ranks, each.samples) if layer in found else ())
            for layer, each in sums.items()
        }

    def invert(self, running: State, damping: float, before: State | None) -> State:
        """Returns eigenvectors, with S carried over from the basis before."""
        (_, q_a), (_, q_g) = symmetric_eigen(running["inputs"]), symmetric_eigen(running["outputs"])
        if before is None:
            scales = q_a.new_zeros(len(q_a), q_g.shape[-1], q_a.shape[-1])
            seen = torch.zeros((), dtype=torch.long, device=q_a.device)
        else:
            turn_a, turn_g = (before["q_a"].mT @ q_a).square(), (before["q_g"].mT @ q_g).square()
            scales, seen = turn_g.mT @ before["scales"] @ turn_a, before["seen"]
        return {"q_a": q_a, "q_g": q_g, "scales": scales, "seen": seen}

    def refine(self, step: Step) -> None:
        """Takes the samples of this step into S."""
        sums = {}
        for layer, found in step.found.items():
            inverse, running = step.inverses.get(layer), step.running[layer]
            total = running["inputs"].new_zeros(self.sizes(running))
            if inverse is not None:
                for kept in found.kept:
                    total += rotated_moments(kept, inverse["q_a"], inverse["q_g"])
            sums[layer] = total
        if step.ranks is not None and sums:
            sums = dict(zip(sums, step.ranks.exchange.total(list(sums.values())), strict=True))
        for layer, total in sums.items():
            if layer not in step.inverses:
                continue
            inverse, samples = step.inverses[layer], step.found[layer].samples
            new = total * (own_scale(step.reduction, samples) ** 2 / samples)
            good = new.isfinite().all()
            scales = moving_average(inverse["scales"], new, inverse["seen"], good, self.average)
            step.inverses[layer] = {**inverse, "scales": scales, "seen": inverse["seen"] + good}

    def direction(self, inverse: State, grad: Float[Tensor, "groups out inp"], damping: float) -> Tensor:
        """Returns v."""
        return scaled_direction(grad, inverse["q_a"], inverse["q_g"], inverse["scales"], damping)


def _in_own_scale(own: Statistics, ranks: Ranks, samples: int) -> tuple[Kept, ...]:
    """Under a mean loss z is 1/N_r of an own gradient, and becomes 1/N of it, N being the samples of all processes."""
    share = own.samples / samples if ranks.mean else 1.0
    return tuple(Kept([(x, z * share) for x, z in each.factors], each.bias) for each in own.kept)


class EKFAC(LayerPreconditioned):
    """Eigenvalue-corrected KFAC; a `torch.optim.Optimizer` for the ordinary training loop.

        v = Q_G [(Q_Gᵀ g Q_A) / (S + γ)] Q_Aᵀ,    S = E_b (Q_Gᵀ g_b Q_A)²,    θ ← SGD(θ, ν·v)

    for every linear and (not transposed) convolution layer, weight and bias together (George et al. 2018; symbols:
    `fngd.kronecker.ekfac`); ν is the KL clip of `KFAC`. The other parameters get the plain gradient. S is exact for the
    samples of a step, sums over positions included, from the first step on.

    Arguments:
        damping: γ > 0, in the units of a squared gradient of a sample's own loss.
        average: weight of the old factors, and of the old S, in the moving averages, 0 ≤ average < 1;
            min(1 − 1/k, average) in the k-th.
        statistics_every: steps between updates of A, G and S, ≥ 1.
        inverse_every: steps between decompositions, ≥ 1: cheap steps between them still follow the gradients by S.
        Others: as for `KFAC`.

    Raises:
        ValueError: an argument out of range, or a model that is reweighted already.

    Approximate: the empirical Fisher matrix, block-diagonal by layer, each block with KFAC's eigenvectors. It keeps x
    and z of every layer until the step, in steps with statistics (about the memory of all activations and their
    gradients), and sends O·I numbers a layer beside KFAC's where there are several processes. A batch with inf or NaN
    leaves A, G and S as they were.

    >>> model = nn.Linear(3, 1)
    >>> opt = EKFAC(model, lr=0.1, inverse_every=100)
    >>> model(torch.randn(8, 3)).square().mean().backward()
    >>> opt.step()
    >>> opt.zero_grad()
    """

    @showing(LayerPreconditioned.__init__)
    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        average: float = 0.95,
        statistics_every: int = 1,
        inverse_every: int = 10,
        **options: Unpack[LayerOptions],
    ) -> None:
        method = EigenbasisMoments(average, "eigen", None)
        super().__init__(model, params, method, statistics_every, inverse_every, **options)
