"""Normalisations: weight and bias act entry by entry on the normalised input x̂, so g_b = Σ_t z_bt ∘ x̂_bt."""

from __future__ import annotations

import torch
from torch import Tensor

from persample.blocks import Block, Dense
from persample.reductions import full_precision
from persample.rules import Site, rule
from persample.rules.elementwise import summed


def per_channel(site: Site, entries: Tensor) -> Block | None:
    """Rows that sum `entries` [N, C, *space] per sample and channel; samples lie along N."""
    if site.owner.axis != 0:
        return None
    return Dense(site.owner.sum_by_sample(entries.reshape(*entries.shape[:2], -1).sum(2)))


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


def channel_sums(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Σ z and Σ z·x over space, [N, C] each: all that the weight's gradient needs, without x̂ ever being formed."""
    count, channels = z.shape[:2]
    z, x = z.reshape(count * channels, 1, -1), x.reshape(count * channels, -1, 1)
    return z.sum(2).view(count, channels), torch.bmm(z, x).view(count, channels)


@rule("NativeGroupNormBackward0")
def group_norm(site: Site) -> Block | None:
    """input [N, C, *space], weight, bias; normalised over groups of channels: Σ z x̂ = (Σ z x − mean Σ z) · rstd."""
    z = full_precision(site.z)
    if site.slot == 2:
        return per_channel(site, z)
    if site.slot != 1:
        return None
    each = z.shape[1] // site.saved("group")
    mean, rstd = (site.saved(name).repeat_interleave(each, 1) for name in ("result1", "result2"))  # [N, C]
    sums, products = channel_sums(z, full_precision(site.saved("input")))
    return per_channel(site, (products - sums * mean) * rstd)


@rule("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
def batch_norm(site: Site) -> Block | None:
    """input [N, C, *space], weight, bias; by running statistics, or by the batch's in the row reading."""
    z = full_precision(site.z)
    if site.slot == 2:
        return per_channel(site, z)
    if site.slot != 1:
        return None
    if site.saved("training", True):
        mean, rstd = site.saved("result1"), site.saved("result2")
    else:
        mean, rstd = site.saved("running_mean"), torch.rsqrt(site.saved("running_var") + site.saved("eps"))
    sums, products = channel_sums(z, full_precision(site.saved("input")))
    return per_channel(site, (products - sums * mean) * rstd)
