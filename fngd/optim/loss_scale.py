"""A loss of another scale than the optimiser was told, noticed in its first step: once, and nothing in later ones.

What the backward pass shows of a layer has the scale of the loss that `backward()` was called on. Where the step
depends on that scale, two slips train badly without an error:

- a GradScaler of which the optimiser knows nothing: gradients are then divided, by a power of two as a rule, between
  the backward pass and the step. Their lengths before and after say so;
- a loss that is a sum where `reduction` says mean, or the reverse. Gradients do not show that; the loss's own node
  does, and the loss is found in the frame of torch's engine, as it waits for this very backward pass.

Both are for a warning. No number that is computed depends on them.
"""

from __future__ import annotations

import math
import sys
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fngd.optim.guards import node_reduction
from persample import LayerGrads

_TOTALS = ("SumBackward0", "MeanBackward0")
_ENGINE = torch.autograd.graph._engine_run_backward.__code__
SAME = 1e-4
"""Ratios that differ by less are one; clipping gives a power of two as closely as that once in thousands of times."""


class FirstScale:
    """Watches the backward passes before an optimiser's first step.

    Arguments:
        reduction: what the optimiser was told.
        scaler: likewise; where there is one, gradients are expected to be divided.
    """

    def __init__(self, reduction: str, scaler: Any) -> None:
        self._reduction, self._scaler = reduction, scaler
        self._task, self._half = -1, False
        self._found: str | None = None
        self._before: dict[Tensor, Tensor] = {}

    def see(self, grads: LayerGrads, groups: Sequence[Mapping[str, Any]]) -> None:
        """To be called in a backward pass, with gradients of one of the layers that it meets."""
        self._half |= any(call.z.dtype is torch.float16 for call in grads.calls)
        task = torch._C._current_graph_task_id()
        if task in (self._task, -1):  # seen, or in no pass of the engine
            return
        self._task = task
        loss = running_loss()
        if loss is not None and grads.batch_size > 1:
            self._found = _reduction(loss.grad_fn, grads.batch_size, scaled=self._scaler is not None)
        if self._scaler is None:
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._note(groups))

    def _note(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """The backward pass is over: notes the lengths of the gradients."""
        self._before = {param: _length(param.grad) for param in _matrices(groups)}

    def look(self, groups: Sequence[Mapping[str, Any]], method: str) -> None:
        """Warns in the first step; it may wait for the device."""
        if self._found not in (None, self._reduction):
            warnings.warn(
                f"the training loss is a {self._found} over the batch, but {method} was constructed with "
                f"reduction={self._reduction!r}: what it takes for the gradients of single samples is of another "
                f"scale. Give it reduction={self._found!r}, or reduce the loss that way",
                UserWarning,
                stacklevel=4,
            )
        ratio = self._ratio(groups)
        if ratio is not None:
            warnings.warn(
                f"the gradients were divided by {1 / ratio:.7g} between the backward pass and the first step, and "
                f"{method} has taken them for those of the training loss. If a GradScaler scales the loss, give it to "
                "the optimiser as scaler=; if you divide gradients by a number of your own, divide the loss by it, "
                "before backward()",
                UserWarning,
                stacklevel=4,
            )

    def _ratio(self, groups: Sequence[Mapping[str, Any]]) -> float | None:
        """By what all gradients were multiplied, where that is a scale and no clipping; else None."""
        pairs = [(_length(param.grad), self._before[param]) for param in _matrices(groups) if param in self._before]
        if not pairs:
            return None
        after, before = torch.stack([torch.stack([each.cpu() for each in pair]) for pair in pairs]).unbind(1)
        there = (before > 0) & before.isfinite() & after.isfinite()
        ratios = (after / before)[there].tolist()
        if not ratios or min(ratios) <= 0 or max(ratios) / min(ratios) > 1 + SAME or max(ratios) > 0.5 + SAME:
            return None
        power = math.log2(ratios[0])
        exact = abs(power - round(power)) < SAME
        return ratios[0] if exact or self._half else None  # a scaled loss whose gradients were clipped, too


def _matrices(groups: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    params = (param for group in groups if group["precondition"] for param in group["params"])
    return [
        param for param in params
        if param.dim() > 1 and param.grad is not None and not param.grad.is_sparse and not hasattr(param, "to_local")
    ]  # fmt: skip


def _length(grad: Tensor | None) -> Tensor:
    assert grad is not None, "of parameters with a gradient"
    return torch.linalg.vector_norm(
        grad.detach(), dtype=torch.float64 if grad.dtype is torch.float64 else torch.float32
    )


def running_loss() -> Tensor | None:
    """Returns the tensor on which the backward pass that runs was called; None where that is not certain.

    Read from the frame of the function in which torch waits for its engine: in this thread, or, where a device has a
    thread of its own, in another one.
    """
    own = threading.get_ident()
    frames = sys._current_frames()
    found = _roots(frames.pop(own))
    if not found:
        found = [roots for frame in frames.values() for roots in _roots(frame)]
    if len(found) != 1 or len(found[0]) != 1:
        return None
    (root,) = found[0]
    return root if isinstance(root, Tensor) and root.numel() == 1 else None


def _roots(frame: Any) -> list[Sequence[Any]]:
    """What the innermost backward pass of a thread starts from."""
    while frame is not None:
        if frame.f_code is _ENGINE:
            return [frame.f_locals["t_outputs"]]
        frame = frame.f_back
    return []


def _reduction(node: Any, batch: int, *, scaled: bool) -> str | None:
    """How a loss was reduced over so many samples; None where its node does not tell."""
    if scaled and node is not None and node.name() == "MulBackward0":  # by the GradScaler
        (node, _), *others = node.next_functions
        if any(other is not None for other, _ in others):
            return None
    sizes = node._saved_self_sym_sizes if node is not None and node.name() in _TOTALS else (batch,)
    # A total over something else than samples (parts of a loss, heads) says nothing of them.
    return node_reduction(node) if math.prod(sizes) % batch == 0 else None
