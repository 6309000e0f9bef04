"""States with parts of their own, and states that do not fit: that is said before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from fngd.optim.distributed import whole_tensor
from fngd.optim.groups import check_group
from fngd.optim.layers import parameter_of
from fngd.optim.state.forms import NUMBER, REMEDY, Maybe, Table, Where, check_form

OPTIONS = (
    "damping", "decoupled_weight_decay", "lr", "momentum", "nesterov", "precondition", "rule", "weight_decay",
)  # fmt: skip
"""What every parameter group of these optimisers has, where it is among their defaults."""
ADAMW_ONLY = ("betas", "eps")
"""What parameter groups with rule="adamw" have besides the optimiser's defaults."""

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
        """Restores what `state_dict` returned; raises ValueError if it does not fit: then nothing has been loaded."""
        given: dict[str, Any] = {}

        def check(_: Optimizer, state: dict[str, Any]) -> None:
            check_form(state, TORCH, "")
            self._check_state(state)
            given.update(state)

        check_form(state_dict, {}, "")
        hooks = (
            self.register_load_state_dict_pre_hook(check),  # after those of the user
            self.register_load_state_dict_post_hook(lambda _: self._load_own_state(given), prepend=True),
        )
        try:
            with whole_or_not(self, self._own_state, self._load_own_state):
                super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


TORCH = {"state": Table((int, str), Table(str, object)), "param_groups": [{"params": [(int, str)]}]}
"""The form of torch's part of a state; distributed checkpoints name parameters in place of numbers."""
_SCALAR = Where((*NUMBER, Tensor), lambda value: not isinstance(value, Tensor) or not value.dim(), "a number")
_GROUP = {
    "lr": _SCALAR, "momentum": _SCALAR, "weight_decay": _SCALAR, "nesterov": bool, "decoupled_weight_decay": bool,
    "foreach?": Maybe(bool), "precondition?": bool, "rule?": str, "eps?": NUMBER,
    "betas?": Where([NUMBER], lambda value: len(value) == 2, "two numbers"),
}  # fmt: skip
_MOMENTS = {"step": Where(Tensor, lambda value: not value.dim(), "one number"), "exp_avg": Tensor, "exp_avg_sq": Tensor}


@contextmanager
def whole_or_not(
    optimizer: Optimizer, own: Callable[[], dict[str, Any]], restore: Callable[[dict[str, Any]], None]
) -> Iterator[None]:
    """Within it a state is loaded; after an exception the optimiser is as it was.

    What stands in a state and fits in form only is noticed where it is used: that is a ValueError as well.
    """
    torchs, kept = {"state": optimizer.state, "param_groups": optimizer.param_groups}, own()
    try:
        yield
    except Exception as error:
        optimizer.__dict__.update(torchs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            restore(kept)
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"the state cannot be read ({type(error).__name__}: {first_line(error)}). {REMEDY}") from error


def first_line(error: Exception) -> str:
    """Returns the first line of what an exception says."""
    return next(iter(str(error).splitlines()), "")


def check_state(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> None:
    """Raises ValueError where the part of a state that is torch's does not fit these parameter groups.

    What torch refuses itself, other numbers of groups and parameters, it is left to refuse.

    Arguments:
        defaults: the optimiser's.
    """
    saved = state_dict["param_groups"]
    expected = [name for name in OPTIONS if name in defaults]
    wanted = [(group, [*expected, *(ADAMW_ONLY if group.get("rule") == "adamw" else ())]) for group in saved]
    missing = {name for group, names in wanted for name in names if name not in group}
    if missing:
        raise ValueError(
            f"the state's parameter groups have no {sorted(missing)}: another kind of optimiser saved it. Load what "
            "its own state_dict() returned; to go on from other training, load the model's state alone"
        )
    for number, group in enumerate(saved):
        check_form(group, _GROUP, f"param_groups[{number}]")
        try:
            check_group(group)
        except ValueError as error:
            raise ValueError(f"the state's parameter group {number} has {first_line(error)}. {REMEDY}") from error
    check_shapes(state_dict, groups)


def check_shapes(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where what a state has of a parameter does not fit it."""
    saved = state_dict["param_groups"]
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
        return
    params = [param for group in groups for param in group["params"]]
    numbers = [(number, group.get("rule")) for group in saved for number in group["params"]]
    if foreign := sorted(map(str, set(state_dict["state"]) - {number for number, _ in numbers})):
        raise ValueError(f"the state has entries {foreign} of parameters that its groups have not. {REMEDY}")
    for place, ((number, rule), param) in enumerate(zip(numbers, params, strict=True)):
        entries = state_dict["state"].get(number, {})
        check_form(entries, _MOMENTS if rule == "adamw" and entries else {}, f"entry of parameter {place}")
        for name, value in entries.items():
            if name == "step":
                continue
            check_form(value, Maybe(Tensor), f"{name} of parameter {place}")
            if value is not None and value.shape != param.shape:
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


def check_sizes(model: nn.Module, layer: str, sizes: tuple[int, int, int], *, rows: bool) -> None:
    """Raises ValueError for factors of another size than the layer's.

    Arguments:
        sizes: (groups, outputs of a group, inputs of a group) that the factors are of.
        rows: whether it may be some rows of its weight that they are of, as a function's are.
    """
    param = parameter_of(model, layer)
    assert param is not None, "check_layers has been called"
    groups, outputs, inputs = sizes
    # A function may have been given the transpose.
    own = (param[0].numel(), len(param)) if rows else (param[0].numel(),)
    if all(inputs - each not in (0, 1) for each in own) or not (rows or groups * outputs == len(param)):
        raise ValueError(
            f"the state's factors of layer '{layer}' are of {inputs} inputs (1 may be the bias) and {groups * outputs} "
            f"outputs, but its weight has shape {list(param.shape)}"
        )
