"""MBF: the Fisher matrix of a layer as many small blocks, one for each kernel of a convolution or each output neuron.

    symbol   meaning                                                                         shape
    w        a mini-block's parameters: in a linear layer what one output has, bias included; in a convolution the
             kernel from one input channel to one output channel, and each bias alone        [n]
    g_b,w    gradient of sample b's own loss, of these parameters                            [n]
    F_w      running mean over samples of g_b,w g_b,wᵀ; of a linear layer the mean of its outputs' (rows="mean")
    γ        damping

    v_w = (F_w + γI)⁻¹ g_w

(Bahamou, Goldfarb, Ren: A Mini-Block Fisher Method for Deep Neural Networks, AISTATS 2023.) F_w is exact for the
samples of a step, sums over positions included. What is kept of a layer are matrices of n numbers a side: k of a kernel
with k elements, I of a linear layer with I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from fngd.kronecker.base import LayerPreconditioned
from fngd.kronecker.kfac import damped_inverse
from fngd.kronecker.method import Method, State
from fngd.kronecker.options import LayerOptions
from fngd.kronecker.processes import Found, Ranks, joined_sums
from fngd.kronecker.statistics import (
    Factors,
    Kept,
    Statistics,
    added,
    moving_average,
    own_scale,
    position_count,
    sample_count,
)
from fngd.optim.checks import showing

ROWS = ("mean", "each")
CHUNK = 2**22
"""Numbers of per-sample gradients that are formed at a time."""


def row_moments(kept: Kept, rows: str) -> Float[Tensor, "groups blocks entries"]:
    """Returns Σ_b g_b,w g_b,wᵀ of a linear layer, w being the weights of an output: of each, or Σ over outputs.

    Blocks are 1 or as many as outputs; entries are the n² of a matrix.
    """
    total: Any = 0.0
    for x, z in kept.chunks(CHUNK):
        if rows == "mean" and x.shape[2] == 1:
            weighted = (x * z.norm(dim=3, keepdim=True)).squeeze(2)
            total = total + (weighted.mT @ weighted).unsqueeze(1)
        else:
            gradients = (z.mT @ x).transpose(1, 2)  # [groups, out, samples, inp]
            if rows == "mean":
                gradients = gradients.flatten(1, 2).unsqueeze(1)
            total = total + gradients.mT @ gradients
    return total.flatten(2)


def kernel_moments(
    kept: Kept, kernel: int
) -> tuple[Float[Tensor, "groups blocks entries"], Float[Tensor, "groups out *bias"]]:
    """Returns Σ_b g_b,w g_b,wᵀ of a convolution, w being a kernel, output channels first, and Σ_b of squared biases.

    The latter have a last axis of 1 where there is a bias, and are zeros without that axis where there is none.
    """
    total: Any = 0.0
    squares: Any = 0.0
    for x, z in kept.chunks(CHUNK):
        gradients = z.mT @ x  # [groups, samples, out, inp]
        if kept.bias:
            squares = squares + gradients[..., -1:].square().sum(1)
            gradients = gradients[..., :-1]
        blocks = gradients.unflatten(3, (-1, kernel)).permute(0, 2, 3, 1, 4)  # [groups, out, channels, samples, kernel]
        total = total + blocks.mT @ blocks
    return total.flatten(1, 2).flatten(2), squares if kept.bias else total.new_zeros(total.shape[:2])


@dataclass(frozen=True)
class MiniBlocks(Method):
    """MBF's part of a step; see `fngd.kronecker.method.Method`.

    "inputs" are the blocks, [groups, blocks, n²]; "outputs" are the biases' second moments, [groups, out, 1], where
    they are blocks of their own, and zeros [groups, out] where they are not.
    """

    average: float
    rows: str

    def collect(self, factors: Factors, *, bias: bool, convolution: bool, random: torch.Generator) -> Statistics:
        """Returns sums over samples."""
        samples, kept = sample_count(factors), Kept(factors, bias)
        x, z = factors[0]
        if convolution:
            inputs, outputs = kernel_moments(kept, x.shape[3 : x.dim() - (z.dim() - 3)].numel())
        else:
            inputs, outputs = row_moments(kept, self.rows), z.new_zeros(z.shape[1:3])
        return Statistics(inputs, outputs, samples, samples * position_count(factors), convolution)

    def combine(self, first: Statistics, second: Statistics) -> Statistics:
        """Returns the sums over both batches."""
        return added(first, second)

    def joined(self, found: Found, ranks: Ranks) -> dict[str, Statistics]:
        """Returns the sums over all processes, of own losses on the way: a sum is of squares of z."""
        power = 2 if ranks.mean else 0
        own = {layer: _scaled(each, float(each.samples) ** power) for layer, each in found.items()}
        sums = joined_sums(own, replace(ranks, mean=False), moments=False)
        return {layer: _scaled(each, float(each.samples) ** -power) for layer, each in sums.items()}

    def update(self, old: State | None, new: Statistics, reduction: str) -> State:
        """Returns the moving averages of the blocks ("inputs") and of the biases' moments ("outputs")."""
        good = new.finite()
        count = torch.zeros((), dtype=torch.long, device=good.device) if old is None else old["count"]
        scale = own_scale(reduction, new.samples) ** 2 / new.samples
        outputs = new.outputs.shape[1]
        mean = outputs if self.rows == "mean" and not new.convolution else 1
        parts = {"inputs": new.inputs * (scale / mean), "outputs": new.outputs * scale}
        averages = {
            name: moving_average(None if old is None else old[name], part, count, good, self.average)
            for name, part in parts.items()
        }
        return {**averages, "count": count + good}

    def sizes(self, running: State) -> tuple[int, int, int]:
        """Returns (groups, outputs, inputs): of a convolution each output has several blocks."""
        blocks, outputs = running["inputs"], running["outputs"]
        each = max(1, blocks.shape[1] // outputs.shape[1])
        return blocks.shape[0], outputs.shape[1], each * math.isqrt(blocks.shape[2]) + (outputs.dim() == 3)

    def invert(self, running: State, damping: float, before: State | None) -> State:
        """Returns (F_w + γI)⁻¹ as [groups, out or 1, blocks, n, n], and 1/(F + γ) of biases."""
        blocks, outputs = running["inputs"], running["outputs"]
        side, each = math.isqrt(blocks.shape[2]), max(1, blocks.shape[1] // outputs.shape[1])
        inverse = damped_inverse(blocks.unflatten(2, (side, side)), damping).unflatten(1, (-1, each))
        return {"blocks": inverse} | ({"bias": 1 / (outputs + damping)} if outputs.dim() == 3 else {})

    def direction(self, inverse: State, grad: Float[Tensor, "groups out inp"], damping: float) -> Tensor:
        """Returns v."""
        blocks, bias = inverse["blocks"], inverse.get("bias")
        weights = grad if bias is None else grad[..., :-1]
        parts = weights.unflatten(2, tuple(blocks.shape[2:4])).unsqueeze(-1)
        direction = (blocks @ parts).flatten(2)
        return direction if bias is None else torch.cat([direction, grad[..., -1:] * bias], 2)


def _scaled(each: Statistics, factor: float) -> Statistics:
    return replace(each, inputs=each.inputs * factor, outputs=each.outputs * factor)


class MBF(LayerPreconditioned):
    """Mini-block Fisher preconditioning; a `torch.optim.Optimizer` for the ordinary training loop.

        v_w = (F_w + γI)⁻¹ g_w,    F_w = E_b g_b,w g_b,wᵀ,    θ ← SGD(θ, ν·v)    (Bahamou, Goldfarb, Ren 2023)

    w is a kernel of a convolution, from one input channel to one output channel, or what an output of a linear layer
    has (symbols: `fngd.kronecker.mbf`); ν is the KL clip of `KFAC`. The other parameters get the plain gradient.

    Arguments:
        damping: γ > 0, in the units of a squared gradient of a sample's own loss.
        rows: of linear layers, "mean" (one F_w, the mean over outputs, [I, I]) or "each" (one for each output,
            [O, I, I]).
        average: weight of the old F_w in the moving average, 0 ≤ average < 1; min(1 − 1/k, average) in the k-th.
        statistics_every: steps between updates of F_w, ≥ 1.
        inverse_every: steps between inverses, ≥ 1.
        Others: as for `KFAC`.

    Raises:
        ValueError: an argument out of range, or a model that is reweighted already.

    Approximate: the empirical Fisher matrix without correlations between mini-blocks. A batch with inf or NaN leaves
    F_w as it was.

    >>> model = nn.Conv2d(3, 4, 3)
    >>> opt = MBF(model, lr=0.1)
    >>> model(torch.randn(8, 3, 5, 5)).square().mean().backward()
    >>> opt.step()
    >>> opt.zero_grad()
    """

    @showing(LayerPreconditioned.__init__)
    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        rows: str = "mean",
        average: float = 0.95,
        statistics_every: int = 1,
        inverse_every: int = 10,
        **options: Unpack[LayerOptions],
    ) -> None:
        if rows not in ROWS:
            raise ValueError(f"rows={rows!r} is unknown; choose one of {list(ROWS)}")
        super().__init__(model, params, MiniBlocks(average, rows), statistics_every, inverse_every, **options)
