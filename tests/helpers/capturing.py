"""What the tests of the backends share: which there are, the loop's results for every case, and a small network."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from oracle import expected, loop_grads
from torch import Tensor, nn

import persample
from persample.testing.cases import Case, find

BACKENDS = persample.backends()
needs_opacus = pytest.mark.filterwarnings("ignore::DeprecationWarning:opacus")
without_opacus = pytest.mark.skipif(find_spec("opacus") is None, reason="opacus is not installed")
every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=without_opacus if name == "opacus" else ()) for name in BACKENDS]
)


def squares(outputs: Tensor, targets: Any) -> Tensor:
    return outputs.square().flatten(1).sum(1)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Broken(nn.Module):
    def __init__(self, kind: type[BaseException] = ArithmeticError) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        raise self.kind("in the middle")


def state(model: nn.Module) -> list[Any]:
    """Hooks, attributes, modes, gradients and values of a model."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found: list[Any] = []
    for module in model.modules():
        found += [module.training, sorted(vars(module)), *(len(getattr(module, table)) for table in tables)]
    for parameter in model.parameters():
        found += [sorted(vars(parameter)), None if parameter.grad is None else parameter.grad.tolist()]
        found += [parameter.tolist(), parameter.requires_grad]
    return found + [buffer.tolist() for buffer in model.buffers()]


def moved(case: Case) -> tuple[nn.Module, Any, Any, Any]:
    """The case at another point: its parameters a little off."""
    model, loss_fn, inputs, targets = case.build()
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype))
    return model, loss_fn, inputs, targets


@cache
def truth(name: str) -> tuple[dict[str, Tensor], dict[Any, Any]]:
    """The loop's gradients of a case, and every reduction of them; "cross_gram" with the case at another point."""
    case = find(name)
    torch.manual_seed(1)
    want = loop_grads(*case.build())
    torch.manual_seed(1)
    other = loop_grads(*moved(case))
    return want, expected(want, other=other)


def captured(built: tuple[nn.Module, Any, Any, Any], backend: str) -> Any:
    torch.manual_seed(1)
    return persample.per_sample(*built, backend=backend)


def captured_or_refused(case: Case, backend: str) -> Any:
    """The result, or the error that refuses it."""
    try:
        return captured(case.build(), backend)
    except persample.PerSampleError as error:
        return error
