"""Which of HyLo's two selections an epoch takes: the dearer one where the gradient changes much.

    Δ_i  the gradients of the preconditioned parameters, added up over epoch i
    R    |‖Δ_i‖ − ‖Δ_{i−1}‖| / ‖Δ_{i−1}‖

Epochs 0 and 1 interpolate; epoch i + 1 does where R reaches the threshold, or a learning rate was halved, or more,
since the end of the epoch before; all others sample (Mu et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fngd.optim.distributed import whole_tensor
from fngd.optim.state.forms import COUNT, NUMBER, REMEDY, Maybe, Table, Where, check_form

KEEPING = ("interpolate", "sample")
"""The two selections, the dearer one first."""
FORM = {
    "select": Where(str, lambda value: value in KEEPING, f"one of {list(KEEPING)}"),
    "length": Maybe(NUMBER),
    "rates": [NUMBER],
    "total": Table(COUNT, Tensor),
}

Groups = Sequence[Mapping[str, Any]]


class Regime:
    """Follows the gradient over epochs. `select` is the selection for the steps to come."""

    def __init__(self, steps_per_epoch: int | None, threshold: float) -> None:
        self._steps, self._threshold = steps_per_epoch, threshold
        self.select = KEEPING[0]
        self._length: float | None = None
        self._rates: list[float] = []
        self._total: dict[Tensor, Tensor] = {}

    def see(self, groups: Groups, completed: int) -> None:
        """Takes a step's gradients, `completed` steps having been before; decides, and waits for the device, as epochs
        end.
        """
        for param in _parameters([group for group in groups if group["precondition"]]):
            if param.grad is not None and not param.grad.is_sparse:
                grad = whole_tensor(param.grad)
                grad = torch.where(grad.isfinite().all(), grad, 0.0)
                self._total[param] = self._total[param] + grad if param in self._total else grad
        if self._steps is None or (completed + 1) % self._steps:
            return
        squares = [total.double().square().sum() for total in self._total.values()]
        length = math.sqrt(torch.stack(squares).sum().item()) if squares else 0.0
        rates = [float(group["lr"]) for group in groups]
        self.select = KEEPING[0] if self._changed(length, rates) else KEEPING[1]
        self._length, self._rates = length, rates
        self._total.clear()

    def _changed(self, length: float, rates: list[float]) -> bool:
        if self._length is None:  # nothing to compare with
            return True
        halved = any(new <= old / 2 < old for new, old in zip(rates, self._rates, strict=False))
        return halved or abs(length - self._length) >= self._threshold * self._length

    def state_dict(self, groups: Groups) -> dict[str, Any]:
        """Returns what resuming needs; sums by number of the parameter."""
        total = {number: self._total[param] for number, param in enumerate(_parameters(groups)) if param in self._total}
        return {"select": self.select, "length": self._length, "rates": list(self._rates), "total": total}

    def load_state_dict(self, state: Mapping[str, Any], groups: Groups) -> None:
        """Takes what `state_dict` has returned, and `check` has seen."""
        params = _parameters(groups)
        self.select, self._length, self._rates = state["select"], state["length"], list(state["rates"])
        self._total = {params[n]: value.to(params[n].device, copy=True) for n, value in state["total"].items()}


def check_regime(state: Any, groups: Groups) -> None:
    """Raises ValueError for what is no state of a `Regime` with these parameters."""
    check_form(state, FORM, "preconditioner['regime']")
    params = _parameters(groups)
    for number, value in state["total"].items():
        if number >= len(params) or value.shape != params[number].shape:
            raise ValueError(f"the state's sum of gradients {number} fits no parameter of this optimiser. {REMEDY}")


def _parameters(groups: Groups) -> list[Tensor]:
    return [param for group in groups for param in group["params"]]
