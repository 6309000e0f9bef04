"""Eva: one vector for a layer's inputs and one for its output gradients in place of KFAC's two matrices.

    symbol   meaning                                                                       shape
    a        running mean of inputs or patches, 1 appended for the bias                    [inp]
    b        running mean of the output gradients of own losses                            [out]
    g, v, γ  gradient, direction, damping

(Zhang, Shi, Li: Eva, ICLR 2023.) The paper states the method for a layer with one position. For T positions the inputs
are averaged and the output gradients added here, b = (1/N) Σ_b Σ_t (N z_bt), so that baᵀ is the mean gradient where
inputs do not vary; the public code averages both.
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
    summed_samples,
)
from fngd.optim.checks import showing
from fngd.optim.presets import with_presets

PRESETS: dict[str | None, dict[str, Any]] = {
    None: {},
    "eva": {"average": 0.05, "damping": 0.03, "statistics_every": 1, "kl_clip": 1e-3},
}
PRESET_SAMPLES = 16
"""Samples of a batch from which the public code takes its vectors."""


def rank_one_direction(
    grad: Float[Tensor, "*groups out inp"],
    a: Float[Tensor, "*groups inp"],
    b: Float[Tensor, "*groups out"],
    damping: float | Tensor,
) -> Float[Tensor, "*groups out inp"]:
    """Returns the direction v = (uuᵀ + γI)⁻¹ g with u = b ⊗ a, by Sherman and Morrison's formula.

        v = (g − [bᵀga / (‖a‖²‖b‖² + γ)] baᵀ) / γ    (Zhang et al. 2023)

    >>> rank_one_direction(torch.tensor([[3.0]]), torch.ones(1), torch.ones(1), damping=0.5)
    tensor([[2.]])
    """
    inner = torch.einsum("...o,...oi,...i->...", b, grad, a)
    share = inner / (a.square().sum(-1) * b.square().sum(-1) + damping)
    # scaled before the product: an outer product of its own would be a second pass over the matrix
    return (grad - (share.unsqueeze(-1) * b).unsqueeze(-1) * a.unsqueeze(-2)) / damping


@dataclass(frozen=True)
class MeanVectors(Method):
    """Eva's part of a step; see `fngd.kronecker.method.Method`."""

    average: float
    preset: str | None

    def collect(self, factors: Factors, *, bias: bool, convolution: bool, random: torch.Generator) -> Statistics:
        """Returns sums over samples, of mean inputs and added (with the preset mean) output gradients."""
        if self.preset is not None:
            factors = [(x[:PRESET_SAMPLES], z[:PRESET_SAMPLES]) for x, z in factors]
        samples, times = sample_count(factors), position_count(factors)
        x, z = summed_samples(factors, bias=bias)
        return Statistics(x / times, z if self.preset is None else z / times, samples, samples, convolution)

    def combine(self, first: Statistics, second: Statistics) -> Statistics:
        """Returns the sums over both batches."""
        return added(first, second)

    def joined(self, found: Found, ranks: Ranks) -> dict[str, Statistics]:
        """Returns the sums over all processes."""
        return joined_sums(found, ranks, moments=False)

    def update(self, old: State | None, new: Statistics, reduction: str) -> State:
        """Returns the moving averages of a ("inputs") and b ("outputs")."""
        good = new.finite()
        count = torch.zeros((), dtype=torch.long, device=good.device) if old is None else old["count"]
        scale = own_scale(reduction, new.samples) if self.preset is None else 1
        means = {"inputs": new.inputs / new.samples, "outputs": new.outputs * (scale / new.samples)}
        averages = {
            name: moving_average(None if old is None else old[name], mean, count, good, self.average)
            for name, mean in means.items()
        }
        return {**averages, "count": count + good}

    def invert(self, running: State, damping: float, before: State | None) -> State:
        """Returns the vectors themselves."""
        return running

    def direction(self, inverse: State, grad: Float[Tensor, "groups out inp"], damping: float) -> Tensor:
        """Returns v."""
        return rank_one_direction(grad, inverse["inputs"], inverse["outputs"], damping)


class Eva(LayerPreconditioned):
    """Kronecker-vectorised approximation of curvature; a `torch.optim.Optimizer` for the ordinary training loop.

        v = (g − [bᵀga / (‖a‖²‖b‖² + γ)] baᵀ) / γ,    θ ← SGD(θ, ν·v)    (Zhang et al., ICLR 2023)

    for every linear and (not transposed) convolution layer, weight and bias together (symbols: `fngd.kronecker.eva`); ν
    is the KL clip of `KFAC`. The other parameters get the plain gradient. It stores two vectors a layer.

    Arguments:
        damping: γ > 0.
        average: weight of the old vectors in the moving average, 0 ≤ average < 1, default 0.95;
            min(1 − 1/k, average) in the k-th.
        statistics_every: steps between updates of the vectors, ≥ 1.
        preset: "eva" for the public code: vectors from the first 16 samples, with weight 0.95 for the new ones (an
            `average` of 0.05), output gradients of the mean loss, averaged over positions; damping=.03, kl_clip=1e-3
            and statistics in every step where none are given.
        Others: as for `KFAC`.

    Raises:
        ValueError: an argument out of range, or a model that is reweighted already.

    Approximate: the Fisher matrix of a layer by a matrix of rank one, γI besides: the direction is g/γ but for its
    part along baᵀ, and its length is left to the KL clip. A batch with inf or NaN leaves the vectors as they were.

    >>> model = nn.Linear(3, 1)
    >>> opt = Eva(model, lr=0.1)
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
        preset: str | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        super().__init__(model, params, MeanVectors(average, preset), statistics_every, statistics_every, **options)
