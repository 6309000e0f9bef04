"""The generic rule: call the node itself, once for each sample, with z masked to that sample.

Exact for every node, because a node's backward is linear in z. It costs B calls (batched where the operation
has a batching rule), so rules exist for what is common.

Zero times NaN is NaN: where what a node has saved of one sample is not finite, calling it for another gives NaN, too.
Then it is called with numbers in the place of those (`persample.attribution.stand_ins`), and with two draws of them: an
entry that is the same both times depends on none of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from persample.attribution.coupling import not_finite_error
from persample.attribution.owner import Owner
from persample.attribution.stand_ins import stand_ins
from persample.blocks.chunking import chunks
from persample.blocks.types import Dense
from persample.graph.calls import call_node_rows
from persample.graph.saved import unpacked_by_hooks
from persample.rules import Site


def generic(site: Site) -> Dense:
    """Returns the dense block of any site."""
    rows = rows_of(site, site.zs)
    if site.batch > 1 and not bool(rows.sum().isfinite()):
        rows = rows_apart(site, rows)
    return Dense(rows)


def rows_of(site: Site, zs: Sequence[Tensor | None]) -> Tensor:
    """The node's gradient for the site's slot, from z at its outputs, sample by sample: [B, *input]."""
    present = [z for z, _ in _present(site, zs)]
    parts = []
    for samples in chunks(site.batch, 4 * sum(z.nbytes for z in present)):
        cotangents = [
            None if z is None or owner is None else owner.masked(z, samples)
            for z, owner in zip(zs, site.owners, strict=True)
        ]
        grad = call_node_rows(site.node, cotangents, [site.slot])[0]
        if grad is None:
            grad = present[0].new_zeros(samples.stop - samples.start, *site.input_shape)
        parts.append(grad)
    return torch.cat(parts) if parts else present[0].new_zeros(0, *site.input_shape)


def _present(site: Site, zs: Sequence[Tensor | None]) -> list[tuple[Tensor, Owner]]:
    """z and its owner where something depends on an output."""
    return [(z, owner) for z, owner in zip(zs, site.owners, strict=True) if z is not None and owner is not None]


def rows_apart(site: Site, rows: Tensor) -> Tensor:
    """The rows of a node, given as they come: what is not finite in one sample is taken out of the others' rows.

    Raises:
        UnsupportedError: it may come from others, and what the node has saved cannot be replaced (checkpointing).
    """
    if unpacked_by_hooks([site.node]):
        finite = [owner.masked(z, slice(None)).flatten(1).isfinite().all(1) for z, owner in _present(site, site.zs)]
        if bool((~rows.flatten(1).isfinite().all(1) & torch.stack(finite).all(0)).any()):
            raise not_finite_error(f"a parameter, {site.node.name()},")
        return rows
    any_z = [
        None if z is None else torch.rand(z.shape, generator=torch.Generator().manual_seed(0)).to(z) for z in site.zs
    ]
    with stand_ins([site.node]):
        alone, first = rows_of(site, site.zs), rows_of(site, any_z)
    with stand_ins([site.node], seed=1):
        second = rows_of(site, any_z)
    return torch.where(first == second, alone, rows)
