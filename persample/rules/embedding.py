"""Tables: one row of z for each row looked up."""

from __future__ import annotations

import torch

from persample.blocks.reductions import full_precision
from persample.blocks.types import Block, Rows
from persample.rules import Site, rule


@rule("EmbeddingBackward0")
def embedding(site: Site) -> Block | None:
    """weight; the padding row gets no gradient. Scaling by frequency counts over the batch: the node knows how."""
    owner, z = site.owner, site.z
    if site.saved("scale_grad_by_freq") or owner.axis is None or owner.axis == z.ndim - 1:
        return None
    indices = site.saved("indices")
    padding = site.saved("padding_idx")
    # autograd keeps C++ integers: -1, no padding, arrives as the largest unsigned one
    z = torch.where((indices == (padding if padding < 2**63 else -1))[..., None], 0, z)
    rows_z, rows_i = owner.by_sample(z), owner.by_sample(indices)
    return Rows(rows_i.flatten(1), rows_z.flatten(1, -2), site.input_shape[0])


@rule("EmbeddingBagBackward0")
def embedding_bag(site: Site) -> Block | None:
    """weight; modes sum and mean. An index adds its bag's z, weighted, or divided by the bag's size."""
    owner = site.owner
    summing, averaging = 0, 1
    if (
        site.slot != 0 or owner.axis != 0 or site.saved("scale_grad_by_freq")
        or site.saved("mode") not in (summing, averaging)
    ):  # fmt: skip
        return None
    indices, bag = site.saved("indices"), site.saved("result1")  # bag of each index
    if bag.numel() != indices.numel():  # offset2bag is not kept by every kernel
        ends = torch.cat([site.saved("offsets"), site.saved("offsets").new_tensor([indices.numel()])])
        bag = torch.repeat_interleave(ends.diff()[: site.z.shape[0]])
    padding = site.saved("padding_idx")
    counted = indices != (padding if padding < 2**63 else -1)
    z = full_precision(site.z)[bag] * counted[:, None]
    if site.saved("mode") == averaging:
        size = torch.zeros(site.z.shape[0], dtype=z.dtype, device=z.device).index_add_(0, bag, counted.to(z.dtype))
        z = z / size.clamp(min=1)[bag][:, None]
    if site.saved("per_sample_weights") is not None:
        z = z * site.saved("per_sample_weights")[:, None]
    of_index = type(owner)(0, owner.ids[bag], owner.batch)
    return Rows(of_index.by_sample(indices), of_index.by_sample(z), site.input_shape[0])
