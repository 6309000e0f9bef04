"""The definition of the per-sample gradient, by a loop that differentiates one loss after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor, nn

from persample.testing.cases import call


def loop_grads(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any
) -> dict[str, Inexact[Tensor, "batch *shape"]]:
    """Returns ∂ℓ_b/∂θ for every trainable parameter, one backward pass per sample: name -> [B, *shape].

    Slow, and what everything else is compared with.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses = loss_fn(call(model, inputs), targets)
    rows = {name: p.detach().new_zeros(len(losses), *p.shape) for name, p in parameters.items()}
    for b, loss in enumerate(losses.unbind() if losses.requires_grad else ()):
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                rows[name][b] = gradient.to_dense()
    return rows


def deviation(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """Returns the largest relative deviation over the entries of two dicts; infinite for other names or shapes.

    Each entry is measured by its own largest value, or by 1e-3 of the largest of all where that is more, so that
    rounding in a gradient of zero does not count. NaN is infinitely wrong.
    """
    if got.keys() != want.keys() or any(got[name].shape != want[name].shape for name in want):
        return float("inf")
    largest = max((float(w.abs().max()) for w in want.values() if w.numel()), default=0.0)
    worst = 0.0
    for name, expected in want.items():
        if expected.numel():
            miss = float((got[name] - expected).abs().max())
            relative = miss / max(float(expected.abs().max()), 1e-3 * largest, 1e-12)
            worst = max(worst, relative if relative == relative else float("inf"))
    return worst
