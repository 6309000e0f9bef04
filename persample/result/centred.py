"""Gram matrices of what is left of gradients without their mean: ⟨g_a - ḡ, g_b - ḡ⟩, as quantum Monte Carlo needs them.

    K̃ = H K H,   H = 1 - 11ᵀ / B

In K the mean is in every entry, and where samples agree the digits of what they differ by are lost; then the rows are
formed, and their mean is taken off before they are multiplied. On an accelerator, where looking halts the host, always.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor

from persample.blocks.cancellation import MOST
from persample.result.grouping import Per

Matrices = TypeVar("Matrices", Tensor, "dict[str, Tensor]", "Tensor | dict[str, Tensor]")


def without_mean(matrices: Matrices, by_rows: Callable[[], Matrices]) -> Matrices:
    """Returns K̃ of Gram matrices [B, B] or [B, C, B, C] (each output around its own mean).

    Args:
        matrices: K, or several by name.
        by_rows: forms K̃ from rows.
    """
    each = dict(matrices) if isinstance(matrices, Mapping) else {"": matrices}
    if not all(matrix.is_cpu for matrix in each.values()):
        return by_rows()
    found = {name: _centred(matrix) for name, matrix in each.items()}
    if any(_lost(matrix, found[name]) for name, matrix in each.items()):
        return by_rows()
    return found if isinstance(matrices, Mapping) else found[""]


def _centred(matrix: Tensor) -> Tensor:
    left, right = 0, matrix.ndim // 2
    matrix = matrix - matrix.mean(left, keepdim=True)
    return matrix - matrix.mean(right, keepdim=True)


def _lost(before: Tensor, after: Tensor) -> bool:
    """Whether a sample has kept less than a part of its square."""
    size = before.shape[: before.ndim // 2].numel()
    squares = [matrix.reshape(size, size).diagonal() for matrix in (before, after)]
    return bool((squares[1] * MOST < squares[0]).any())


def refuse_mean(other: object, per: str) -> Per:
    """Returns `per`; raises `ValueError` for two batches, and for positions, whose mean is not told."""
    if per == "position":
        raise ValueError(
            "centred=True and per='position' exclude each other: shares of positions have no mean of theirs"
        )
    if other is not None:
        raise ValueError(
            "centred=True takes the mean of one batch off its gradients, and other= holds another batch. Capture both "
            "in one batch, or centre with dot(mean), the mean being weighted_sum(torch.full((B,), 1 / B))"
        )
    return cast("Per", per)


def mean_of(weighted_sum: Callable[[Tensor], dict[str, Tensor]], losses: Tensor) -> dict[str, Tensor]:
    """1/B Σ_b g_b with an axis in front, [1, *shape], by name."""
    weights = torch.full_like(losses, 1 / max(len(losses), 1))
    return {name: each[None] for name, each in weighted_sum(weights).items()}
