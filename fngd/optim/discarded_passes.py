"""Backward passes whose gradients nobody steps with: a generator's loss through this model, an adversarial example's.

The loop clears them by the model's `zero_grad()`, of which the optimiser hears nothing. What it has kept of such a pass
(its place among the passes of the step, statistics, samples to join) would be taken for a part of the next step. So a
later pass looks whether the first one's gradients are gone. Clearing by zeros, set_to_none=False, leaves no trace.

Gradients may also be gone because they are gathered elsewhere: by FSDP, or by hooks on the parameters (accumulation in
another precision). Such passes count. A loop that takes them out of `.grad` by its own hand, with no hooks, is not told
from one that throws them away.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


class FirstPass:
    """The first backward pass since the last step; asked from within backward passes."""

    def __init__(self) -> None:
        self._task, self._accumulates = -1, False

    def begin(self, param: Tensor | None) -> None:
        """Notes that the pass that runs is the first one; it reaches `param`."""
        self._task = torch._C._current_graph_task_id()
        self._accumulates = accumulates(param)

    def discarded(self, param: Tensor | None, groups: Iterable[dict[str, Any]]) -> bool:
        """Whether the pass that runs is a later one, and no parameter has a gradient left of the first.

        autograd.grad leaves none, so passes of that kind count.
        """
        return torch._C._current_graph_task_id() != self._task and self.gone(groups) and accumulates(param)

    def gone(self, groups: Iterable[dict[str, Any]]) -> bool:
        """Whether the first pass left gradients, and no parameter has one any more."""
        return self._accumulates and nothing_left(groups)


def nothing_left(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether no parameter has a gradient, here or elsewhere."""
    return all(_without(each) for group in groups for each in group["params"])


def _without(param: Tensor) -> bool:
    """Whether there is no gradient, here or where a hook has put it."""
    return param.grad is None and not hasattr(param, "to_local") and not param._post_accumulate_grad_hooks


def accumulates(param: Tensor | None) -> bool:
    """Whether the pass that runs adds to the parameter's `.grad`."""
    if param is None or not param.requires_grad:
        return False
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(param).node)
    except RuntimeError:  # said of a leaf whose gradient autograd.grad was asked for
        return False


class UnderWay:
    """Backward passes that have begun and not ended: they run, or have raised."""

    def __init__(self) -> None:
        self._passes: set[int] = set()
        self._heard = -1

    def __bool__(self) -> bool:
        return bool(self._passes)

    def hear(self) -> None:
        """A backward pass is under way, perhaps one that is known."""
        task = torch._C._current_graph_task_id()
        if task != self._heard and task >= 0:
            self._heard = task
            self._passes.add(task)
            # Of a pass that raises it is not called.
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._passes.discard, task))

    def clear(self) -> None:
        """Forgets them."""
        self._passes.clear()
