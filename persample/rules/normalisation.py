"""Normalisations: weight and bias act entry by entry on the normalised input x̂, so g_b = Σ_t z_bt ∘ x̂_bt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from persample.blocks.reductions import full_precision
from persample.blocks.types import Block, Dense
from persample.rules import Site, allowance, rule
from persample.rules.elementwise import summed

BATCH_NORMS = "NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"
UNITS = 4
"""Roundings of a normalised entry: of mean, σ, the difference and the quotient."""


def per_channel(site: Site, entries: Tensor) -> Block | None:
    """Rows that sum `entries` [N, C] by sample; samples lie along N."""
    return Dense(site.owner.sum_by_sample(entries)) if site.owner.axis == 0 else None


def channel_gradients(z: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Σ z x̂ and Σ z over space, [N, C] each, with x̂ = (x − mean) · rstd; z and x [N, C, *space], statistics [N, G].

    The kernel sums over the batch as well, so the whole batch goes in as channels of one sample: it reads z and x
    once, and x̂ is never formed.
    """
    count, channels = z.shape[:2]
    if not count:
        return z.new_zeros(0, channels), z.new_zeros(0, channels)
    z, x = z.reshape(1, count * channels, -1).contiguous(), x.reshape(1, count * channels, -1).contiguous()
    # The kernel reads memory as it lies: one channel that is expanded over samples reshapes without a copy.
    mean, rstd = (statistic.reshape(1, -1).to(z.dtype).contiguous() for statistic in (mean, rstd))
    _, weight, bias = torch.ops.aten.native_group_norm_backward(
        z, x, mean, rstd, z.new_ones(z.shape[1]), 1, z.shape[1], z.shape[2], mean.shape[1], [False, True, True]
    )
    return weight.view(count, channels), bias.view(count, channels)


def normalised_channels(site: Site, statistics: Callable[[], tuple[Tensor, Tensor]]) -> Block | None:
    """The block of weight (slot 1) or bias (slot 2), both computed at once."""
    if site.slot not in (1, 2) or site.owner.axis != 0:
        return None
    if "channels" not in site.shared:
        z, x = full_precision(site.z), full_precision(site.saved("input"))
        site.shared["channels"] = channel_gradients(z, x, *statistics())
    return per_channel(site, site.shared["channels"][site.slot - 1])


@rule("NativeLayerNormBackward0")
def layer_norm(site: Site) -> Block | None:
    """input, weight, bias; normalised over the last dimensions."""
    z = full_precision(site.z)
    if site.slot == 2:
        return summed(site, z)
    if site.slot != 1:
        return None
    mean, rstd = site.saved("result1"), site.saved("result2")
    return summed(site, z * ((full_precision(site.saved("input")) - mean) * rstd))


@rule("FusedRmsNormBackward0")
def rms_norm(site: Site) -> Block | None:
    """input, weight."""
    if site.slot != 1:
        return None
    normalised = full_precision(site.saved("input")) * site.saved("result1")
    return summed(site, full_precision(site.z) * normalised)


@rule("NativeGroupNormBackward0")
def group_norm(site: Site) -> Block | None:
    """input [N, C, *space], weight, bias; normalised over groups of channels."""
    return normalised_channels(site, lambda: (site.saved("result1"), site.saved("result2")))


@rule(*BATCH_NORMS)
def batch_norm(site: Site) -> Block | None:
    """input [N, C, *space], weight, bias; by running statistics, or by the batch's in the row reading."""

    return normalised_channels(site, lambda: batch_statistics(site))


def batch_statistics(site: Site) -> tuple[Tensor, Tensor]:
    """Mean and 1 / σ, [N, C]: a group of its own for every channel of every sample."""
    if site.saved("training", True):
        mean, rstd = site.saved("result1"), site.saved("result2")
    else:
        mean, rstd = site.saved("running_mean"), torch.rsqrt(site.saved("running_var") + site.saved("eps"))
    each = (site.saved("input").shape[0], mean.shape[0])
    return mean.expand(each), rstd.expand(each)


@allowance("NativeLayerNormBackward0", "NativeGroupNormBackward0", *BATCH_NORMS)
def not_centred(site: Site) -> float:
    """`UNITS` ε ‖z ∘ x / σ‖: x̂ is the difference of x / σ and mean / σ, and is rounded as these are."""
    z, x = full_precision(site.z), full_precision(site.saved("input"))
    if site.node.name() == "NativeLayerNormBackward0":
        terms = z * x * site.saved("result2")
    else:
        rstd = batch_statistics(site)[1] if site.node.name() in BATCH_NORMS else site.saved("result2")
        terms = (z * x).reshape(*rstd.shape, x.numel() // max(1, rstd.numel())) * rstd[:, :, None]
    return UNITS * torch.finfo(x.dtype).eps * float(torch.linalg.vector_norm(terms))
