"""What KFAC, SKFAC, Eva and Shampoo share: directions in place of gradients, then a first-order step.

`step` takes what is in `.grad` by then (unscaled, clipped, averaged over processes), preconditions it, and hands it
to SGD or AdamW. `.grad` itself stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fngd.optim.coverage import Coverage
from fngd.optim.first_order import first_order_step
from fngd.optim.groups import check_group, completed_group
from fngd.optim.layers import Part
from fngd.optim.state.copying import Copied
from fngd.optim.state.forms import COUNT, check_form
from fngd.optim.state.parts import OwnState, not_compiled


class Preconditioned(Copied, OwnState):
    """Base: `_directions` gives preconditioned gradients, every other parameter takes the plain one."""

    def __init__(
        self, groups: Iterable[Any], defaults: dict[str, Any], model: nn.Module | None = None, other: str = "sgd"
    ) -> None:
        self._completed = 0
        super().__init__(groups, defaults)
        self._coverage = Coverage(type(self).__name__, model)
        self._coverage.begin(self.param_groups, other)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; as in `torch.optim.Optimizer`, with the options checked."""
        super().add_param_group(completed_group(param_group))
        check_group(self.param_groups[-1])
        if hasattr(self, "_coverage"):  # torch's constructor calls this, too
            self._coverage.add(self.param_groups[-1:])

    @not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step with the gradients in `.grad`; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._look_at(loss)
        counts = not self._only_makes_state()
        directions = self._directions() if counts else {}
        if counts:
            self._coverage.look(lambda: self._preconditioned(directions))
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                first_order_step(
                    self._stepped(group), params, [directions.get(param, param.grad) for param in params], self.state
                )
        if counts:
            self._completed += 1
        else:
            self._as_new()
        return loss

    def _stepped(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options that a group is stepped with."""
        return group

    def _look_at(self, loss: Any) -> None:
        """Raises ValueError where a closure's loss is none that the directions are right for."""

    def _preconditioned(self, directions: Mapping[Tensor, Tensor]) -> tuple[list[Part], Callable[[Tensor], str]]:
        """What is, and why a parameter is not."""
        raise NotImplementedError(f"{type(self).__name__} defines _preconditioned")

    def _directions(self) -> dict[Tensor, Tensor]:
        """Preconditioned gradients by parameter."""
        raise NotImplementedError(f"{type(self).__name__} defines _directions")


def checked_state(state_dict: Mapping[str, Any], method: str) -> Any:
    """Returns the part of a state that is not torch's; raises ValueError where another method saved it."""
    own = state_dict.get("preconditioner")
    if own is not None:
        check_form(own, {"method": str, "completed": COUNT}, "preconditioner")
    if own is None or own["method"] != method:
        saved = "no preconditioner" if own is None else f"one of {own['method']}"
        raise ValueError(f"the state has {saved}; this optimiser is {method}. Load what its own state_dict() returned.")
    return own
