"""What a saved state of NGD or FNGD must hold besides torch's part, said in a sentence before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fngd.natural.policy import NETWORK
from fngd.natural.sharing.table import CoefficientTable
from fngd.optim.state.forms import COUNT, NUMBER, Table, Where, check_form
from fngd.optim.state.parts import check_layers

FORM = {
    "adaptive?": {"factor": Where(NUMBER, lambda value: value > 0, "a number > 0"), "completed": COUNT},
    "sampling?": Tensor, "met?": Where(Tensor, lambda value: value.dtype == torch.long, "integers"),
}  # fmt: skip
"""Of all but the coefficients."""


def check_saved(state: Mapping[str, Any], method: str, table: CoefficientTable | None, model: nn.Module) -> None:
    """Raises ValueError unless the state is that of such an optimiser.

    Args:
        state: what is to be loaded.
        method: the optimiser's name.
        table: its shared coefficients, if it has some.
        model: whose layers the state may name.
    """
    if "preconditioner" in state:
        raise ValueError(
            f"the state was saved by {state['preconditioner']['method']}, and this optimiser is {method}. Load what "
            "its own state_dict() returned"
        )
    if table is not None and "coefficients" not in state:
        raise ValueError(
            "the state has no 'coefficients': it was not saved by an optimiser that shares them, or by way of "
            "torch.distributed.checkpoint, which keeps nothing but 'state' and 'param_groups'. Save what "
            "state_dict() returns as it is"
        )
    check_form(state, FORM, "")
    if table is not None:
        check_form(state["coefficients"], {"rows": Table(tuple, Tensor)}, "coefficients")
        check_layers(model, {layer for layer, _ in state["coefficients"]["rows"]} - {NETWORK}, "coefficients")
        table.check_state(state["coefficients"])
