"""FNGD: natural gradient descent that computes coefficients in one epoch and shares them with later ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fngd.natural.base import NaturalSGD
from fngd.natural.options import Options
from fngd.natural.sharing.processes import Met
from fngd.natural.sharing.table import SHARES, CoefficientTable
from fngd.optim.checks import showing
from fngd.optim.distributed import world_size
from fngd.optim.groups import first_parameter
from fngd.optim.layers import parameter_of


class FNGD(NaturalSGD):
    """Fast natural gradient descent; a `torch.optim.Optimizer` for the ordinary training loop.

        d_l = U c,    c = (K + λB·I)⁻¹ 1 of an earlier epoch,    λ = α‖K‖_F    (FNGD paper, eqs. 9, 14; IV-B)

    for every linear and convolution layer l, weight and bias together; the other parameters get the plain
    gradient. Both then go through SGD with momentum and weight decay. In the first epoch c is computed;
    after that a step costs one elementwise product per layer more than SGD. See `fngd.coefficients` and
    `fngd.natural.sharing.table`.

    Arguments:
        model: the model; its `loss.backward()` accumulates d instead of g until `remove()`.
        params: parameters or parameter groups, as for any optimiser; default: all of the model's.
        steps_per_epoch: optimiser steps in an epoch, len(loader); needed unless share is None.
        share: "position" (the paper's), "sample" (then announce ids by `next_batch`; processes tell each other at the
            end of an epoch what they have computed), None (nothing: as `NGD`).
        samples: the number of samples in the data set, ids being below it; only with share="sample".
        refresh_epochs: compute c anew in every R-th epoch, R ≥ 1; None: only in the first.
        refresh_cosine: in (0, 1]; compute anew in the epoch after one whose first batch has fresh factors with a
            smaller cosine to the stored ones, in one layer: `probe_layer`, or the first that is met.
        control: "constant" or "permuted", to test what the coefficients bring; see `fngd.natural.sharing.table`.
        seed: of the permutations.
        Others: as for `NGD`; fisher="true" with share=None only. adapt_damping measures the steps that
            compute coefficients; a changed damping takes effect when they are computed next.

    Raises:
        ValueError: an argument out of range, or a model that is reweighted already. In the backward pass: a
            batch of another size than the stored one, more batches than steps_per_epoch, missing sample ids.

    Approximate: as `NGD`, and the coefficients are those of an earlier epoch: with share="position" of
        other samples. With gradient accumulation each backward pass within a step has its own row of
        coefficients; with accumulate="joint" the rows of a step come from one solve. A pass whose
        gradients are thrown away (of a GAN's generator, or SAM's first) does not count if the model's zero_grad() does
        so, set_to_none, or if the model is frozen for it; the optimiser's zero_grad() says that a batch is skipped.

    >>> model = nn.Linear(3, 1)
    >>> opt = FNGD(model, lr=0.1, steps_per_epoch=1)
    >>> for epoch in range(2):
    ...     model(torch.randn(8, 3)).square().mean().backward()
    ...     opt.step()
    ...     opt.zero_grad()
    """

    @showing(NaturalSGD.__init__)
    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        steps_per_epoch: int | None = None,
        share: str | None = "position",
        samples: int | None = None,
        refresh_epochs: int | None = None,
        refresh_cosine: float | None = None,
        probe_layer: str | None = None,
        control: str | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        if share not in SHARES:
            raise ValueError(f"share={share!r} is unknown; choose one of {list(SHARES)}")
        if share is not None:
            self._table = CoefficientTable(
                steps_per_epoch,
                share=share,
                samples=samples,
                refresh_epochs=refresh_epochs,
                refresh_cosine=refresh_cosine,
                probe_layer=probe_layer,
                control=control,
                seed=seed,
            )
        elif any(option is not None for option in (control, refresh_epochs, refresh_cosine, probe_layer, samples)):
            raise ValueError(
                "control, refresh_epochs, refresh_cosine, probe_layer and samples need share='position' or "
                "share='sample'"
            )
        super().__init__(model, params, seed=seed, **options)
        self._met = Met(self._policy.exchange)

    def _check_probe(self) -> None:
        path = None if self._table is None else self._table.probe_layer
        if path is None:
            return
        known = self._handle.layers
        if path in known and self._chosen(path):
            return
        if path in self._handle.explain():
            raise ValueError(
                f"probe_layer={path!r} takes the plain gradient or is another layer's second name, and would never "
                f"be probed. Choose one of {[each for each in known if self._chosen(each)]}"
            )
        weight = parameter_of(self._model, path) if self._functions else None
        if weight is None or weight.dim() != 2:
            raise ValueError(
                f"probe_layer={path!r} is no layer of the model. Its layers are {list(known)}; a weight that a "
                "function uses goes by its name"
            )

    def next_batch(self, sample_ids: Tensor) -> None:
        """Announces which samples the coming backward pass sees, integers [B]; with share="sample" only.

        >>> model = nn.Linear(3, 1)
        >>> opt = fngd.FNGD(model, lr=0.1, steps_per_epoch=1, share="sample", samples=8)
        >>> ids = torch.randperm(8)
        >>> opt.next_batch(ids)
        >>> model(torch.randn(8, 3)[ids]).square().mean().backward()
        >>> opt.step()
        """
        table = self._sharing()
        table.next_batch(sample_ids)
        if table.computing:
            self._met.add(torch.as_tensor(sample_ids))

    def start_epoch(self) -> None:
        """Announces that an epoch begins; optional. From then on a loader that is too long is an error.

        >>> model = nn.Linear(3, 1)
        >>> opt = fngd.FNGD(model, lr=0.1, steps_per_epoch=1)
        >>> for epoch in range(2):
        ...     opt.start_epoch()
        ...     model(torch.randn(8, 3)).square().mean().backward()
        ...     opt.step()
        ...     opt.zero_grad()
        """
        table = self._sharing()
        place = table.epoch, table.computing
        table.start_epoch()
        self._merge(table, *place)

    @property
    def computing(self) -> bool:
        """Whether the coming backward pass computes coefficients, as far as its epoch tells: or stored ones are used.

        >>> model = nn.Linear(3, 1)
        >>> opt, found = fngd.FNGD(model, lr=0.1, steps_per_epoch=1), []
        >>> for epoch in range(2):
        ...     found.append(opt.computing)
        ...     model(torch.randn(8, 3)).square().mean().backward()
        ...     opt.step()
        >>> found
        [True, False]
        """
        return self._table is None or self._table.computing

    def _end_batch(self) -> None:
        table = self._table
        if table is None:
            super()._end_batch()
            return
        place = table.epoch, table.computing
        super()._end_batch()
        self._merge(table, *place)

    def _merge(self, table: CoefficientTable, epoch: int, computing: bool) -> None:
        """Where an epoch has ended: coefficients by sample go to all processes."""
        # Where probes decide, one process may compute while another does not.
        due = table.epoch != epoch and (computing or table.refresh_cosine is not None)
        if due and table.share == "sample" and world_size(self._group) > 1:
            self._met.merge(table.rows, first_parameter(self.param_groups).device)

    def _own_state(self) -> dict[str, Any]:
        met = self._met.ids()
        return super()._own_state() | ({"met": met} if len(met) else {})

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        super()._load_own_state(state)
        self._met.load(state.get("met"))

    def _sharing(self) -> CoefficientTable:
        if self._table is None:
            raise ValueError("share=None keeps no coefficients, so there is nothing to announce")
        return self._table
