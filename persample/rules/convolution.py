"""Convolutions of every kind: one node covers 1 to 3 dimensions, transposed or not, every padding mode."""

from __future__ import annotations

import torch

from persample.blocks.convolution.gradients import ConvSpec, per_sample_grads
from persample.blocks.types import Block, Conv, Dense
from persample.rules import Site, rule


@rule("ConvolutionBackward0")
def convolution(site: Site) -> Block | None:
    """input, weight, bias."""
    owner, z = site.owner, site.z
    if owner.axis != 0 or z.is_complex() or site.slot == 0:
        return None
    if site.slot == 2:
        return Dense(owner.sum_by_sample(z.flatten(2).sum(2)))
    spec = ConvSpec(
        weight_shape=site.input_shape,
        stride=tuple(site.saved("stride")),
        padding=tuple(site.saved("padding")),
        dilation=tuple(site.saved("dilation")),
        transposed=site.saved("transposed"),
        output_padding=tuple(site.saved("output_padding")),
        groups=site.saved("groups"),
    )
    if owner.layout == "identity":
        return Conv(site.saved("input"), z, spec)
    # several images of one sample (frames folded into the batch, windows): one gradient each, then their sum
    rows = per_sample_grads(site.saved("input"), z, spec)
    result = rows.new_zeros(site.batch + 1, *rows.shape[1:])
    return Dense(result.index_add_(0, torch.where(owner.ids < 0, site.batch, owner.ids), rows)[: site.batch])
