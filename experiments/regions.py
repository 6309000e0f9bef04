"""Where the time of a training step goes: forward, backward, statistics, solve, direction, update.

statistics   Gram matrices (NGD, FNGD); factors or moments and their moving averages (the others)
solve        coefficients; inverses, decompositions, roots
direction    from gradient to preconditioned gradient, where that is not part of the backward pass, as it is in (F)NGD
update       the rest of `opt.step()`: momentum, weight decay, parameters

A region's time excludes that of regions within it. On a GPU each switch waits for the device, which costs time of its
own: totals are measured without regions.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fngd import shampoo, smw_coefficients
from persample import LayerGrads

REGIONS = ("forward", "backward", "statistics", "solve", "direction", "update")


@dataclass
class Clock:
    """Exclusive seconds by region."""

    device: str
    seconds: dict[str, float] = field(default_factory=dict)
    _stack: list[str] = field(default_factory=list)
    _since: float = 0.0

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Counts what happens inside as `name`."""
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function, its time counted as `name`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.region(name):
                return function(*args, **kwargs)

        return call

    def _switch(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] = self.seconds.get(self._stack[-1], 0.0) + now - self._since
        self._since = now


class _Timed:
    """A layer-wise method whose parts are timed."""

    def __init__(self, method: Any, clock: Clock) -> None:
        self._method = method
        for name, region in (("update", "statistics"), ("invert", "solve"), ("direction", "direction")):
            setattr(self, name, clock.timed(region, getattr(method, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)


def _everywhere(function: Callable[..., Any], clock: Clock) -> list[tuple[Any, str, Any]]:
    """The modules of fngd that have imported a function by name, with its timed form: it solves."""
    name, timed = function.__name__, clock.timed("solve", function)
    modules = [module for path, module in sys.modules.items() if path.partition(".")[0] == "fngd"]
    return [(module, name, timed) for module in modules if vars(module).get(name) is function]


@contextmanager
def watched(optimizer: Any, clock: Clock) -> Iterator[None]:
    """Times the parts of one of our optimisers; torch's own have nothing but their update."""
    places: list[tuple[Any, str, Any]] = []
    wrapped: AbstractContextManager[None] = nullcontext()
    if hasattr(optimizer, "_moments"):  # Shampoo
        places.append((optimizer, "_updated", clock.timed("statistics", optimizer._updated)))
        places.append((optimizer, "_direction", clock.timed("direction", optimizer._direction)))
        places += _everywhere(shampoo.inverse_root, clock)
    elif hasattr(optimizer, "_running"):  # KFAC, SKFAC, Eva
        wrapped = optimizer.handle.wrapped(partial(clock.timed, "statistics"))
        places.append((optimizer, "_method", _Timed(optimizer._method, clock)))
    else:  # NGD and FNGD; torch's optimisers never call these
        places.append((LayerGrads, "gram", clock.timed("statistics", LayerGrads.gram)))
        places += _everywhere(smw_coefficients, clock)
    with ExitStack() as stack:
        stack.enter_context(wrapped)
        for owner, name, new in places:
            stack.enter_context(mock.patch.object(owner, name, new))
        yield


def breakdown(
    model: nn.Module, optimizer: Optimizer, loss: Callable[[nn.Module], Tensor], device: str
) -> dict[str, float]:
    """Makes one training step and returns its seconds by region, 0 where a region was not entered."""
    clock = Clock(device)
    with watched(optimizer, clock):
        with clock.region("forward"):
            value = loss(model)
        with clock.region("backward"):
            value.backward()
        with clock.region("update"):
            optimizer.step()
            optimizer.zero_grad()
    return {name: clock.seconds.get(name, 0.0) for name in REGIONS}
