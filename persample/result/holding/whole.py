"""The losses of the whole batch, from a pass without a graph, that those of chunks are compared with."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

from persample.backends.shared import buffers_kept
from persample.blocks.precision import coarsest
from persample.capture.sum_check import check_losses
from persample.capture.types import Problem
from persample.result.holding.deterministic import Still, random_state

JITTERS, ROUNDINGS = 3, 32
"""Times that the inputs are rounded in another way, and how many times the largest change in a loss is allowed."""


@dataclass(frozen=True)
class Whole:
    """The losses of the whole batch, to compare those of chunks with."""

    problem: Problem
    losses: Float[Tensor, " batch"]
    still: bool
    """Whether they are without chance, because the model draws random numbers."""

    def agrees(self, part: slice, losses: Tensor, inputs: Any, targets: Any) -> bool:
        """Whether a part of the samples has the same losses alone."""
        if self.still:
            alone, _ = losses_without_graph(replace(self.problem, inputs=inputs, targets=targets), still=True)
            if alone is None:
                return True
            losses = alone
        precision = computed_in(self.losses, self.problem.parameters.values())
        expected = self.losses[part]
        return _agree(losses, expected, self.losses, precision) or self._rounded(losses, expected, inputs, targets)

    def _rounded(self, losses: Tensor, expected: Tensor, inputs: Any, targets: Any) -> bool:
        """Whether the difference is no more than rounding the inputs makes of losses: they may be what is left of
        large numbers that cancel."""
        generator, largest = torch.Generator().manual_seed(0), torch.zeros_like(losses)

        def jittered(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.layout != torch.strided:
                return leaf
            signs = 2 * torch.randint(2, leaf.shape, generator=generator, dtype=torch.int8) - 1
            return leaf * (1 + torch.finfo(leaf.dtype).eps * signs.to(leaf))

        before, _ = losses_without_graph(replace(self.problem, inputs=inputs, targets=targets), still=self.still)
        for _ in range(JITTERS if before is not None else 0):
            other = replace(self.problem, inputs=tree_map(jittered, inputs), targets=targets)
            after, _ = losses_without_graph(other, still=self.still)
            largest = largest.maximum((after - before).abs()) if after is not None else largest
        return bool(((losses - expected).abs() <= ROUNDINGS * largest.max()).all()) if len(losses) else True


def whole(problem: Problem) -> Whole | None:
    """The losses of the whole batch; None where there are none, for the model differentiates or lacks the memory."""
    losses, drawn = losses_without_graph(problem, still=False)
    if drawn:
        losses, _ = losses_without_graph(problem, still=True)
    return None if losses is None else Whole(problem, check_losses(losses), drawn)


def losses_without_graph(problem: Problem, *, still: bool) -> tuple[Any, bool]:
    """Runs the model, which is left as it was; returns the losses, None if there are none, and whether it has drawn.

    With `still` it runs without chance.
    """
    before = random_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it treats padding in another way
    try:
        with torch.random.fork_rng(), buffers_kept(problem.model), torch.no_grad(), Still() if still else nullcontext():
            losses = problem.losses()
            drawn = any(not torch.equal(a, b) for a, b in zip(before, random_state(), strict=False))
    except RuntimeError:
        return None, False
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return losses, drawn


def computed_in(losses: Tensor, parameters: Collection[Tensor]) -> torch.dtype:
    """The coarsest precision that losses are computed in, as far as one can tell without running the model."""
    found = coarsest(losses, *parameters)
    if torch.is_autocast_enabled(losses.device.type):
        return max(found, torch.get_autocast_dtype(losses.device.type), key=lambda dtype: torch.finfo(dtype).eps)
    return found.to_real()


def _agree(losses: Tensor, expected: Tensor, whole: Tensor, precision: torch.dtype | None) -> bool:
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(precision or losses.dtype, 5e-2)
    finite = whole[whole.isfinite()].abs()
    largest = float(finite.max()) if len(finite) else 0.0
    return torch.allclose(losses, expected, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
