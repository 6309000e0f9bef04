"""States with parts of their own, and states that do not fit: that is said before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from fngd.distributed import whole_tensor
from fngd.members import parameter_of

OPTIONS = ("decoupled_weight_decay", "lr", "momentum", "nesterov", "weight_decay")
"""What every parameter group of these optimisers has."""

# Of an optimiser Dynamo traces reads of attributes, and drops what is assigned to them: a step would not count.
not_compiled = torch.compiler.disable(reason="fngd counts its steps, which torch.compile of an optimiser does not")


class OwnState(Optimizer):
    """An optimiser whose state is more than torch's "state" and "param_groups".

    The hooks that users register for states see all of it, as torch promises: those of saving when it is complete,
    those that follow loading when all is loaded. What those that precede loading make of a state is what is loaded.
    """

    def _own_state(self) -> dict[str, Any]:
        """What there is besides torch's two entries, by name."""
        raise NotImplementedError(f"{type(self).__name__} defines _own_state")

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for a state that cannot be loaded."""
        raise NotImplementedError(f"{type(self).__name__} defines _check_state")

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        """Takes what `_own_state` has returned; torch's part has been loaded."""
        raise NotImplementedError(f"{type(self).__name__} defines _load_own_state")

    def _only_makes_state(self) -> bool:
        """Whether a step is the one by which torch.distributed.checkpoint has a new optimiser make its state.

        It is no batch's: there is no state yet, and learning rates and gradients are zeros.
        """
        rates = [group["lr"] for group in self.param_groups]
        if self.state or any((isinstance(rate, Tensor) and rate.device.type != "cpu") or rate != 0 for rate in rates):
            return False
        grads = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        return bool(grads) and not any(grad.is_sparse or bool(whole_tensor(grad).any()) for grad in grads)

    def _as_new(self) -> None:
        """Undoes what that step has put into moments: weight decay, and a step that was counted."""
        for state in self.state.values():
            for value in state.values():
                value.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's optimiser state and what else a run needs to go on."""
        own = self.register_state_dict_post_hook(lambda _, state: {**state, **self._own_state()}, prepend=True)
        try:
            return super().state_dict()
        finally:
            own.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; raises ValueError, before anything is loaded, if it does not fit."""
        given: dict[str, Any] = {}

        def check(_: Optimizer, state: dict[str, Any]) -> None:
            self._check_state(state)
            given.update(state)

        hooks = (
            self.register_load_state_dict_pre_hook(check),  # after those of the user
            self.register_load_state_dict_post_hook(lambda _: self._load_own_state(given), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


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
    # A function may have been given the transpose.
    own = (param[0].numel(), len(param)) if rows else (param[0].numel(),)
    if all(inputs - each not in (0, 1) for each in own) or not (rows or outputs == len(param)):
        raise ValueError(
            f"the state's factors of layer '{layer}' are of {inputs} inputs (1 may be the bias) and {outputs} outputs, "
            f"but its weight has shape {list(param.shape)}"
        )
