"""States of KFAC and its kin: whether a saved one fits, and where its tensors belong."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fngd.kronecker.method import Method, State
from fngd.optim.layers import parameter_of
from fngd.optim.state.forms import REMEDY, Table, Where, check_form
from fngd.optim.state.parts import check_layers, check_sizes

COUNTED = {"inputs": Tensor, "outputs": Tensor, "count": Where(Tensor, lambda value: not value.dim(), "one number")}
FORM = {"random": Tensor, "running": Table(str, COUNTED), "inverses": Table(str, Table(str, Tensor))}
"""Of what a state has under "preconditioner"."""


def check_factors(own: Mapping[str, Any], model: nn.Module, method: Method, modules: Collection[str]) -> None:
    """Raises ValueError where what a state has under "preconditioner" does not fit the model's layers.

    Arguments:
        modules: paths of layers that are modules; others are functions, and may be rows of a weight.
    """
    check_form(own, FORM, "preconditioner")
    check_layers(model, own["running"], "factors")
    for layer, factors in own["running"].items():
        check_sizes(model, layer, _sizes(method, layer, factors), rows=layer not in modules)
    if foreign := sorted(set(own["inverses"]) - set(own["running"])):
        raise ValueError(f"the state has inverses of layers {foreign}, and no factors of them. {REMEDY}")
    for layer, inverse in own["inverses"].items():
        _try_out(method, layer, own["running"][layer], inverse)


def _sizes(method: Method, layer: str, factors: State) -> tuple[int, int, int]:
    try:
        return method.sizes(factors)
    except (IndexError, RuntimeError, ZeroDivisionError):
        shapes = {name: list(tensor.shape) for name, tensor in factors.items()}
        raise ValueError(
            f"the state's factors of layer '{layer}' cannot be this method's: {shapes}. {REMEDY}"
        ) from None


def _try_out(method: Method, layer: str, running: State, inverse: State) -> None:
    """Raises ValueError where an inverse does not precondition gradients of its layer's shape."""
    grad = running["inputs"].new_zeros(_sizes(method, layer, running))
    try:
        direction = method.direction(inverse, grad, 1.0)
        fits = direction.shape == grad.shape and not inverse["count"].dim()
    except (RuntimeError, KeyError, IndexError):
        fits = False
    if not fits:
        shapes = {name: list(tensor.shape) for name, tensor in inverse.items()}
        raise ValueError(f"the state's inverses of layer '{layer}' do not fit its factors: {shapes}. {REMEDY}")


def placed(model: nn.Module, states: Mapping[str, State]) -> dict[str, State]:
    """Returns copies of states, by layer, on the devices of their layers."""
    result = {}
    for layer, state in states.items():
        param = parameter_of(model, layer)
        assert param is not None, "load_state_dict has checked"
        result[layer] = {name: tensor.to(param.device, copy=True) for name, tensor in state.items()}
    return result


def moved(state: State, like: Tensor) -> State:
    """Returns the state where the layer is now, and in its precision: models are moved and cast."""
    if all(tensor.device == like.device and tensor.dtype in (like.dtype, torch.long) for tensor in state.values()):
        return state
    return {
        name: tensor.to(like) if tensor.is_floating_point() else tensor.to(like.device)
        for name, tensor in state.items()
    }
