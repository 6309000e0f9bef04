"""The place in the epoch, and which epochs compute coefficients (FNGD paper, Section IV-B).

Epoch 0 computes and later ones reuse, but for

- `refresh_epochs`: every R-th epoch computes;
- `refresh_cosine`: in the first batch of each epoch that reuses factors, one layer's are computed all the same,
  and kept from the step; where their cosine with the stored ones is below the threshold, the next epoch
  computes. That is decided when the epoch closes, so that no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fngd.coefficients import is_number


class Epochs:
    """Counts batches and epochs.

    Arguments:
        steps_per_epoch: optimiser steps (batches) in one epoch.
        refresh_epochs: compute anew in every R-th epoch (R ≥ 1); None: only in the first.
        refresh_cosine: threshold in (0, 1] on the cosine of the probed layer's factors; None: no probes.
        probe_layer: the layer that is probed; None: the first that is asked for.
    """

    def __init__(
        self,
        steps_per_epoch: int,
        *,
        refresh_epochs: int | None = None,
        refresh_cosine: float | None = None,
        probe_layer: str | None = None,
    ) -> None:
        if refresh_cosine is not None and not (is_number(refresh_cosine) and 0 < refresh_cosine <= 1):
            raise ValueError(
                f"refresh_cosine={refresh_cosine!r}; it is the cosine of two vectors and must be in (0, 1]"
            )
        if probe_layer is not None and refresh_cosine is None:
            raise ValueError(f"probe_layer={probe_layer!r} needs refresh_cosine=, the threshold")
        self.steps_per_epoch, self.refresh_epochs = steps_per_epoch, refresh_epochs
        self.refresh_cosine, self.probe_layer = refresh_cosine, probe_layer
        self.epoch, self.index = 0, 0
        self.cosine: Tensor | None = None  # of the last probe
        self._products: Tensor | None = None  # ⟨stored, fresh⟩, ‖stored‖², ‖fresh‖² of it
        self.agree: Callable[[Tensor | None], Tensor | None] = lambda products: products
        """Gives, when an epoch closes, the sum of these over the processes that are to decide as one."""
        self._stale = False  # whether it asks this epoch to compute
        self._explicit = False  # whether the user announces epochs

    @property
    def computing(self) -> bool:
        """Whether this epoch computes coefficients."""
        return (
            self.epoch == 0
            or self._stale
            or (self.refresh_epochs is not None and self.epoch % self.refresh_epochs == 0)
        )

    @property
    def place(self) -> int:
        """Which batch of the epoch this is, from 0; the user may announce an epoch late."""
        return self.index % self.steps_per_epoch

    def check_place(self) -> None:
        """Raises ValueError where an epoch that the user has announced has more batches than it should."""
        if self._explicit and self.index >= self.steps_per_epoch:
            raise ValueError(
                f"batch {self.index + 1} of an epoch, but steps_per_epoch is {self.steps_per_epoch}. "
                "Give the optimiser steps_per_epoch=len(loader), counted in optimiser steps."
            )

    def start_epoch(self) -> None:
        """Announces that an epoch begins. Optional: without it, an epoch is every steps_per_epoch steps."""
        if self._explicit or self.index:
            self.close_epoch()
        self._explicit = True

    def advance(self) -> None:
        """Ends a step: the next backward pass belongs to the next batch."""
        self.index += 1
        if not self._explicit and self.index == self.steps_per_epoch:
            self.close_epoch()

    def close_epoch(self) -> None:
        """Ends the epoch; looks at what was probed."""
        self.epoch, self.index = self.epoch + 1, 0
        if self.refresh_cosine is not None:
            total = self.agree(self._products)
            if total is not self._products and total is not None:
                self.cosine = total[0] / (total[1] * total[2]).sqrt()
        # NaN asks for nothing: the batch that was probed was not finite.
        self._stale = (
            self.cosine is not None and self.refresh_cosine is not None and bool(self.cosine < self.refresh_cosine)
        )
        self.cosine = self._products = None

    def probing(self, layer: str) -> bool:
        """Whether stored factors of the layer are to be compared with fresh ones now, by `probe`."""
        if self.refresh_cosine is None or self.index:
            return False
        return self.cosine is None and layer == (self.probe_layer if self.probe_layer is not None else layer)

    def probe(self, stored: Float[Tensor, " batch"], fresh: Float[Tensor, " batch"]) -> None:
        """Keeps the cosine of stored and fresh factors for the end of the epoch."""
        self.cosine = torch.nn.functional.cosine_similarity(stored, fresh, dim=0)
        self._products = torch.stack([stored @ fresh, stored @ stored, fresh @ fresh])

    def state_dict(self) -> dict[str, Any]:
        """Returns the place, and what the next epoch depends on; tensors are not copied."""
        return {
            "epoch": self.epoch,
            "index": self.index,
            "explicit": self._explicit,
            "steps_per_epoch": self.steps_per_epoch,
            "stale": self._stale,
            "cosine": self.cosine,
            "products": self._products,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restores what `state_dict` returned, with tensors on `device`."""
        self.epoch, self.index, self._explicit = state["epoch"], state["index"], state["explicit"]
        self._stale, cosine = state.get("stale", False), state.get("cosine")  # absent in states of version 0.1
        self.cosine = None if cosine is None else cosine.to(device, copy=True)
        products = state.get("products")
        self._products = None if products is None else products.to(device, copy=True)
