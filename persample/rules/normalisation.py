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


@rule("NativeGroupNormBackward0")
def group_norm(site: Site) -> Block | None:
    """input [N, C, *space], weight, bias; normalised over groups of channels."""
    z = full_precision(site.z)
    if site.slot == 2:
        return per_channel(site, z)
    if site.slot != 1:
        return None
    mean, rstd = site.saved("result1"), site.saved("result2")  # [N, groups]
    x = full_precision(site.saved("input"))
    grouped = x.reshape(x.shape[0], site.saved("group"), -1)
    normalised = (grouped - mean[..., None]) * rstd[..., None]
    return per_channel(site, z * normalised.reshape(x.shape))


@rule("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
def batch_norm(site: Site) -> Block | None:
    """input [N, C, *space], weight, bias; by running statistics, or by the batch's in the row reading."""
    z = full_precision(site.z)
    if site.slot == 2:
        return per_channel(site, z)
    if site.slot != 1:
        return None
    x = full_precision(site.saved("input"))
    if site.saved("training", True):
        mean, rstd = site.saved("result1"), site.saved("result2")
    else:
        mean, rstd = site.saved("running_mean"), torch.rsqrt(site.saved("running_var") + site.saved("eps"))
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    return per_channel(site, z * ((x - mean.view(shape)) * rstd.view(shape)))
