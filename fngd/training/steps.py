"""One training step with any optimiser: what it asks of the loop besides `step()`.

| what the optimiser has                           | what the loop does                                        |
| ------------------------------------------------ | --------------------------------------------------------- |
| methods `train()` and `eval()` (schedule-free)   | calls them before steps and before the model is evaluated |
| a true attribute `create_graph` (AdaHessian)     | `loss.backward(create_graph=True)`                        |
| a `step` whose `closure` has no default (L-BFGS) | `step(closure)`, without a backward pass before it        |
| a true attribute `closure` (SAM)                 | a backward pass, then `step(closure)`                     |

The closure clears the gradients, computes the loss of the same batch, and makes its backward pass. The two attributes
are set by whoever constructs the optimiser: `opt = AdaHessian(…); opt.create_graph = True`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def set_mode(optimizer: Optimizer, *, training: bool) -> None:
    """Calls the optimiser's own `train()` or `eval()`, where it has one."""
    method = getattr(optimizer, "train" if training else "eval", None)
    if callable(method):
        method()


def optimizer_step(optimizer: Optimizer, loss: Callable[[], Tensor]) -> Tensor:
    """Makes one step and clears the gradients; returns the loss before it, detached.

    Arguments:
        loss: computes the batch's loss, of no axes; called once, or as often as the optimiser calls its closure.

    >>> weight = torch.nn.Parameter(torch.tensor(3.0))
    >>> optimizer_step(torch.optim.LBFGS([weight], max_iter=20), lambda: (weight - 1).square())
    tensor(4.)
    >>> round(weight.item(), 3)
    1.0
    """
    losses: list[Tensor] = []
    own_step: Any = optimizer.step

    @torch.enable_grad()
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        _backward(value, bool(getattr(optimizer, "create_graph", False)))
        losses.append(value.detach())
        return value

    if _needs_closure(optimizer):
        own_step(closure)
    else:
        closure()
        if getattr(optimizer, "closure", False):
            own_step(closure)
        else:
            own_step()
    optimizer.zero_grad()
    return losses[0]


def _backward(loss: Tensor, create_graph: bool) -> None:
    if not create_graph:
        loss.backward()
        return
    with warnings.catch_warnings():  # zero_grad() breaks the cycle that torch warns of
        warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True")
        loss.backward(create_graph=True)


def _needs_closure(optimizer: Optimizer) -> bool:
    parameter = inspect.signature(optimizer.step).parameters.get("closure")
    return parameter is not None and parameter.default is parameter.empty
