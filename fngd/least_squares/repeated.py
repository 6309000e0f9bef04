"""A closure of residuals that is called several times in a step, as if it had been called once.

The first call and those at other parameters must be of the same function. Points or dropout masks drawn from the
generators of torch, of NumPy's legacy functions and of Python's `random` are: each further call of a step starts from
the state in which the first one found them, and leaves them as the first one did. So new points come with every step.
A generator object of the closure's own goes on; `same` finds that out.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fngd.least_squares.residuals import Residuals, finite_or_error, read_residuals
from fngd.least_squares.reweighing import Reweighing, State

DRAWS = (
    "Points drawn within the closure from the global generators (torch.rand, numpy.random.rand, random) are the same "
    "in all calls of a step, and new in the next; those from a torch.Generator, a numpy Generator or a data loader are "
    "not. Draw these between steps, outside the closure"
)


class RepeatedClosure:
    """The closure of one step.

    Arguments:
        closure: returns residuals, and gets no arguments.
        weights: of their groups.
        device: of the parameters, whose generator counts besides the CPU's.
        reweigh: gives the weights of single residuals, at the first call for all of them.
        states: of `reweigh`; those that follow the first call after it.
    """

    def __init__(
        self, closure: Callable[[], Any], weights: Mapping[str, float], device: torch.device,
        reweigh: Reweighing | None = None, states: Sequence[State] = (),
    ) -> None:  # fmt: skip
        self._closure, self._weights, self._device = closure, weights, device
        self._reweigh, self.states = reweigh or Reweighing(None), list(states)
        self._omega: dict[str, Tensor] = {}
        self._before = self._after = random_states(device)
        self.repeats = 0
        """Calls after the first one."""

    def first(self) -> Residuals:
        """Returns the residuals, with their graph, where nothing has been drawn yet. Raises ValueError for NaN."""
        with torch.enable_grad():
            found = finite_or_error(read_residuals(self._closure(), self._weights))
        self._after = random_states(self._device)
        if self._reweigh.parts:
            groups = {name: group.detach() for name, group in found.groups.items()}
            self._omega, self.states = self._reweigh(groups, self.states)
        return found.weighted(self._omega)

    def again(self) -> Residuals:
        """Returns the residuals at the parameters as they are now, of the same random numbers."""
        self.repeats += 1
        restore(self._before, self._device)
        try:
            with torch.enable_grad():
                return read_residuals(self._closure(), self._weights).weighted(self._omega)
        finally:
            restore(self._after, self._device)


@contextmanager
def graph_kept() -> Iterator[None]:
    """Says in a sentence what autograd says where the graph of the residuals is used up or out of date."""
    try:
        yield
    except RuntimeError as error:
        if not any(
            sign in str(error) for sign in ("modified by an inplace operation", "through the graph a second time")
        ):
            raise
        raise ValueError(
            "the graph of the residuals is of no use any more. If the model was called outside the closure, call it "
            "within: opt.step(lambda: model(x) - y). If the closure writes to its points or buffers in place, give it "
            f"new tensors instead, or change them between steps. Autograd says: {error}"
        ) from error


def random_states(device: torch.device) -> tuple[Any, ...]:
    """States of the global generators: torch's on the CPU and the device, Python's, and NumPy's where it is loaded."""
    numpy = sys.modules.get("numpy")
    backend: Any = None if device.type == "cpu" else torch.get_device_module(device)
    own = backend.get_rng_state() if hasattr(backend, "get_rng_state") else None
    return torch.get_rng_state(), own, random.getstate(), None if numpy is None else numpy.random.get_state()


def restore(states: tuple[Any, ...], device: torch.device) -> None:
    """Puts back what `random_states` returned."""
    cpu, own, python, legacy = states
    torch.set_rng_state(cpu)
    if own is not None:
        torch.get_device_module(device).set_rng_state(own)
    random.setstate(python)
    if legacy is not None:
        sys.modules["numpy"].random.set_state(legacy)


def same(first: Residuals, other: Residuals) -> str | None:
    """Returns what differs between residuals of one point that should be equal; None where nothing does.

    Sums in no fixed order on a GPU differ in their last digits, so half of the digits count.
    """
    if _sizes(first) != _sizes(other):
        return f"residuals by group: {_sizes(first)}, then {_sizes(other)}"
    for name, group in first.groups.items():
        noise = torch.finfo(group.dtype).eps ** 0.5 * group.detach().abs().amax()
        if not bool((group - other.groups[name]).detach().abs().amax() <= noise):
            return f"values in group {name!r}"
    return None


def unchanged(first: Residuals, other: Residuals, change: Tensor, visible: float) -> str | None:
    """Returns the name of a group that is the same at other parameters, though its derivatives tell of a change.

    Arguments:
        change: of the scaled residuals, as their Jacobian has it, [B].
        visible: its norm from which rounding cannot hide it.
    """
    start = 0
    for name, group in first.groups.items():
        predicted = torch.linalg.vector_norm(change[start : start + len(group)]).item()
        start += len(group)
        if predicted > visible and torch.equal(group.detach(), other.groups[name].detach()):
            return name
    return None


def _sizes(residuals: Residuals) -> dict[str, int]:
    return {name: len(group) for name, group in residuals.groups.items()}
