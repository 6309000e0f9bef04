"""The generic rule: call the node itself, once for each sample, with z masked to that sample.

Exact for every node, because a node's backward is linear in z. It costs B calls (batched where the operation
has a batching rule), so rules exist for what is common.
"""

from __future__ import annotations

import torch

from persample.blocks import Dense
from persample.chunking import chunks
from persample.graph import call_node_rows
from persample.rules import Site


def generic(site: Site) -> Dense:
    """Returns the dense block of any site."""
    present = [(z, owner) for z, owner in zip(site.zs, site.owners, strict=True) if z is not None]
    bytes_each = 4 * sum(z.nbytes for z, _ in present)
    parts = []
    for samples in chunks(site.batch, bytes_each):
        cotangents = [
            None if z is None or owner is None else owner.masked(z, samples)
            for z, owner in zip(site.zs, site.owners, strict=True)
        ]
        grad = call_node_rows(site.node, cotangents, [site.slot])[0]
        if grad is None:
            grad = present[0][0].new_zeros(samples.stop - samples.start, *site.input_shape)
        parts.append(grad)
    return Dense(torch.cat(parts) if parts else present[0][0].new_zeros(0, *site.input_shape))
