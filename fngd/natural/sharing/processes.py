"""Coefficients by sample in several processes: whoever met a sample computed its coefficient, and tells the others.

A distributed sampler deals samples anew in every epoch. So at the end of an epoch that computes, the processes add up
what they have found out in it; where two have met the same sample, the others take the mean.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from jaxtyping import Float
from torch import Tensor

from fngd.optim.distributed import Exchange, world_size

Rows = MutableMapping[tuple[str, int], Float[Tensor, " samples"]]


class Met:
    """The ids of the samples that this process has met in the present epoch, while it computed; none if it is alone."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange, self._ids = exchange, [torch.zeros(0, dtype=torch.long)]

    def add(self, ids: Tensor) -> None:
        """Notes a batch."""
        if world_size(self._exchange.group) > 1:
            self._ids.append(ids.detach().clone())

    def merge(self, rows: Rows, device: torch.device) -> None:
        """Adds what others have computed to `rows`, in place, and forgets the epoch; every process has to call it.

        rows: by layer a factor for each sample, NaN where it is unknown; layers that others alone have run are added,
            on `device`.
        """
        ids = self.ids()
        self._ids = self._ids[:1]
        own = {layer: (row.dtype, len(row)) for (layer, _), row in rows.items()}
        everyone = {layer: kind for each in self._exchange.everyone_says(own) for layer, kind in each.items()}
        layers = sorted(everyone)
        if not layers:
            return
        for layer in set(layers) - set(own):  # this process has not run it, and may get samples of one that has
            dtype, samples = everyone[layer]
            rows[layer, 0] = torch.full((samples,), torch.nan, dtype=dtype, device=device)
        table = torch.stack([rows[layer, 0] for layer in layers])
        known = torch.zeros_like(table, dtype=torch.bool)
        known[:, ids.to(table.device)] = True
        known &= ~table.isnan()
        total, count = self._exchange.total([torch.where(known, table, 0), known.to(table.dtype)])
        mean = torch.where(~known & (count > 0), total / count, table)
        for layer, merged in zip(layers, mean, strict=True):
            rows[layer, 0].copy_(merged)

    def ids(self) -> Tensor:
        """Returns all of them, in one tensor: what a state keeps."""
        return torch.cat([ids.to(self._ids[-1].device) for ids in self._ids])

    def load(self, ids: Tensor | None) -> None:
        """Takes what `ids` has returned; None: a state has none."""
        self._ids = self._ids[:1] if ids is None else [self._ids[0], ids.clone()]
