"""What Kronecker-factored methods make of a layer's inputs and output gradients in a batch.

    symbol    meaning                                                         shape
    N         samples that the statistics were gathered from
    T         positions in a sample (tokens, output pixels); R = N·T rows
    x_bt      layer input or input patch, with 1 appended where a bias goes   [inp]
    z_bt      gradient of the *training* loss w.r.t. the output               [out]
    groups    of a convolution; each has a factor pair of its own

A mean loss over N samples makes z_bt 1/N of the gradient of sample b's own loss, N·z_bt; `own_scale` is that N.
Sums are kept unnormalised with their counts, so that micro-batches of gradient accumulation add up to what
the joined batch would have given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fngd.kronecker.patches import patch_moment, summed_patches, with_ones

Factors = Sequence[tuple[Tensor, Tensor]]
"""(x [batch, groups, inp, *kernel, *time], z [batch, groups, out, *time]) of each call; `LayerGrads.factors`."""

Rows = tuple[Float[Tensor, "groups batch time inp"], Float[Tensor, "groups batch time out"]]


@dataclass(frozen=True)
class Kept:
    """A layer's inputs and output gradients in a backward pass, and whether a bias goes with them."""

    factors: Factors
    bias: bool

    def chunks(self, numbers: int) -> Iterator[Rows]:
        """Yields `all_positions` of some samples at a time; their rows and gradients have about `numbers` entries."""
        x, z = self.factors[0]
        gradient = x.shape[1] * x.shape[2 : x.dim() - (z.dim() - 3)].numel() * z.shape[2]
        rows = sum(part[0].numel() for pair in self.factors for part in pair)
        size = max(1, numbers // (gradient + rows))
        for start in range(0, len(z), size):
            part = [(x[start : start + size], z[start : start + size]) for x, z in self.factors]
            yield all_positions(part, bias=self.bias)


@dataclass(frozen=True)
class Statistics:
    """What one or more batches say about a layer; what `inputs` and `outputs` hold is the method's business.

    `samples` are N; `rows` is the number that the sum over `outputs` is an average of, R unless positions were reduced.
    `kept` are passes, for methods that read inputs and output gradients again in the step; of this process alone.
    `weights` say what `inputs` and `outputs` stand for, where they are those of some samples.
    """

    inputs: Float[Tensor, "groups *inputs"]
    outputs: Float[Tensor, "groups *outputs"]
    samples: int
    rows: int
    convolution: bool
    kept: tuple[Kept, ...] = ()
    weights: Tensor | None = None

    def finite(self) -> Tensor:
        """Returns one bool, on the device: whether there is no inf and no NaN."""
        return self.inputs.isfinite().all() & self.outputs.isfinite().all()


def added(first: Statistics, second: Statistics) -> Statistics:
    """Returns the statistics of both batches, where they are sums over samples."""
    return Statistics(
        first.inputs + second.inputs,
        first.outputs + second.outputs,
        first.samples + second.samples,
        first.rows + second.rows,
        first.convolution,
        first.kept + second.kept,
    )


def own_scale(reduction: str, samples: int) -> int:
    """Returns the factor from a sample's share of the training loss's gradient to the gradient of its own loss."""
    return samples if reduction == "mean" else 1


def sample_count(factors: Factors) -> int:
    """Returns N."""
    return factors[0][1].shape[0]


def position_count(factors: Factors) -> int:
    """Returns T, over all calls of the layer."""
    return sum(z.shape[3:].numel() for _, z in factors)


def all_positions(factors: Factors, *, bias: bool) -> Rows:
    """Returns x and z with one row for each position of each sample, [groups, batch, time, features]."""
    parts = [(_rows(x, z.dim() - 3), _rows(z, z.dim() - 3)) for x, z in factors]
    return _joined(parts, bias)


def some_positions(factors: Factors, index: Sequence[int], *, bias: bool) -> Rows:
    """Returns x and z at the positions `index` (0 … T − 1, over all calls), the same ones in every sample."""
    parts, start = [], 0
    for x, z in factors:
        shape = z.shape[3:]
        here = torch.tensor([t - start for t in index if start <= t < start + shape.numel()], dtype=torch.long)
        start += shape.numel()
        if len(here):
            where: list[Any] = [
                axis.to(z.device, non_blocking=True) for axis in torch.unravel_index(here, tuple(shape))
            ]
            parts.append((_rows(x[(..., *where)], 1), _rows(z[(..., *where)], 1)))
    return _joined(parts, bias)


def summed_positions(
    factors: Factors, *, bias: bool
) -> tuple[Float[Tensor, "groups batch inp"], Float[Tensor, "groups batch out"]]:
    """Returns Σ_t x_bt and Σ_t z_bt; no patches are formed."""
    inputs, outputs = [], []
    for x, z in factors:
        inputs.append(summed_patches(x).flatten(2).transpose(0, 1))
        outputs.append(z.sum(tuple(range(3 - z.dim(), 0))).transpose(0, 1))
    x_sum, z_sum = sum(inputs[1:], inputs[0]), sum(outputs[1:], outputs[0])
    return (F.pad(x_sum, (0, 1), value=float(position_count(factors))) if bias else x_sum), z_sum


def summed_samples(factors: Factors, *, bias: bool) -> tuple[Float[Tensor, "groups inp"], Float[Tensor, "groups out"]]:
    """Returns Σ_bt x_bt and Σ_bt z_bt; no patches are formed."""
    inputs = [summed_patches(x, batch=True).flatten(1) for x, _ in factors]
    outputs = [z.sum((0, *range(3 - z.dim(), 0))) for _, z in factors]
    x_sum, z_sum = sum(inputs[1:], inputs[0]), sum(outputs[1:], outputs[0])
    count = float(position_count(factors) * sample_count(factors))
    return (F.pad(x_sum, (0, 1), value=count) if bias else x_sum), z_sum


def second_moments(
    factors: Factors, *, bias: bool, convolution: bool
) -> tuple[Float[Tensor, "groups inp inp"], Float[Tensor, "groups out out"]]:
    """Returns Σ_bt x_bt x_btᵀ and Σ_bt z_bt z_btᵀ; no more patches are formed than the cache holds."""
    if convolution:
        inputs = [patch_moment(x) for x, _ in factors]
        outputs = [_batched_moment(z.flatten(3)) for _, z in factors]
    else:  # rows in memory one after the other: [batch, 1, features, time] is the transposed view
        inputs, outputs = (
            [_row_moment(part.permute(1, 0, 3, 2).flatten(1, 2)) for part in parts]
            for parts in zip(*factors, strict=True)
        )
    a, g = sum(inputs[1:], inputs[0]), sum(outputs[1:], outputs[0])
    if bias:
        a = with_ones(a, summed_samples(factors, bias=False)[0], position_count(factors) * sample_count(factors))
    return a, g


def _row_moment(rows: Tensor) -> Tensor:
    return rows.mT @ rows


def _batched_moment(z: Float[Tensor, "batch groups out time"]) -> Float[Tensor, "groups out out"]:
    """Products of single samples where they are no larger than z; there they save a copy of it."""
    if z.shape[3] >= z.shape[2]:
        return (z @ z.mT).sum(0)
    columns = z.permute(1, 2, 0, 3).flatten(2)
    return columns @ columns.mT


def moving_average(
    old: Tensor | None, new: Tensor, count: Tensor, good: Tensor, decay: float
) -> Float[Tensor, "groups *shape"]:
    """Returns β·old + (1 − β)·new with β = min(1 − 1/k, decay), k = count + 1; where `good` is False: old.

    (Martens and Grosse 2015, Section 5.) The first value is taken as it is. `old` None: zeros.
    """
    old = torch.zeros_like(new) if old is None else old
    weight = (1 - 1 / (count.to(new.dtype) + 1)).clamp(max=decay)
    return torch.where(good, torch.lerp(new, old, weight), old)


def _rows(tensor: Tensor, times: int) -> Tensor:
    """[batch, groups, *features, *time] -> [groups, batch, time, features]; of a linear layer a view."""
    features = tuple(range(2, tensor.dim() - times))
    time = tuple(range(tensor.dim() - times, tensor.dim()))
    sizes = [tensor.shape[axis] for axis in features], [tensor.shape[axis] for axis in time]
    inp, steps = (torch.Size(size).numel() for size in sizes)
    ordered = tensor.permute(1, *features, 0, *time)
    return ordered.reshape(tensor.shape[1], inp, tensor.shape[0], steps).permute(0, 2, 3, 1)


def _joined(parts: list[tuple[Tensor, Tensor]], bias: bool) -> Rows:
    x, z = (rows[0] if len(rows) == 1 else torch.cat(rows, 2) for rows in zip(*parts, strict=True))
    return (F.pad(x, (0, 1), value=1.0) if bias else x), z
