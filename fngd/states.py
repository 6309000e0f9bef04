"""States that do not fit: of another optimiser, or of other parameters. Said before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fngd.members import parameter_of

OPTIONS = ("decoupled_weight_decay", "lr", "momentum", "nesterov", "weight_decay")
"""What every parameter group of these optimisers has."""


def check_state(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where the part of a state that is torch's does not fit these parameter groups.

    What torch refuses itself, other numbers of groups and parameters, it is left to refuse.
    """
    saved = state_dict["param_groups"]
    missing = sorted({name for group in saved for name in OPTIONS if name not in group})
    if missing:
        raise ValueError(
            f"the state's parameter groups have no {missing}: another kind of optimiser saved it. Load what its "
            "own state_dict() returned; to go on from other training, load the model's state alone"
        )
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
        return
    params = [param for group in groups for param in group["params"]]
    numbers = [number for group in saved for number in group["params"]]
    for place, (number, param) in enumerate(zip(numbers, params, strict=True)):
        for name, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != param.shape:
                raise ValueError(
                    f"the state's {name} of parameter {place} has shape {list(value.shape)}, but that parameter has "
                    f"{list(param.shape)}: the state is that of another model, or of parameters in another order"
                )


def check_layers(model: nn.Module, layers: Collection[str], what: str) -> None:
    """Raises ValueError if there is no weight of one of these names in the model; `what` a state has of them."""
    unknown = sorted(layer for layer in layers if parameter_of(model, layer) is None)
    if unknown:
        known = [path for path, module in model.named_modules() if module._parameters.get("weight") is not None]
        raise ValueError(
            f"the state has {what} of layers {unknown}; this model's layers are {known}. Construct the optimiser with "
            "the model as the saved one was, wrapped (DistributedDataParallel) or not"
        )


def check_sizes(model: nn.Module, layer: str, factors: Mapping[str, Tensor], *, rows: bool) -> None:
    """Raises ValueError for Kronecker factors of another size than the layer's.

    `rows`: it may be some rows of its weight that they are of, as a function's are.
    """
    param = parameter_of(model, layer)
    assert param is not None, "check_layers has been called"
    inputs, outputs = factors["inputs"].shape[-1], factors["outputs"].shape[0] * factors["outputs"].shape[-1]
    if inputs - param[0].numel() not in (0, 1) or not (rows or outputs == len(param)):
        raise ValueError(
            f"the state's factors of layer '{layer}' are of {inputs} inputs (1 may be the bias) and {outputs} outputs, "
            f"but its weight has shape {list(param.shape)}"
        )
