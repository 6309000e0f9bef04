"""Checks: what is asked of losses before, and of per-sample gradients after the computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from persample.blocks import Block
from persample.errors import CheckError
from persample.reductions import full_precision, weighted_sum

# What rounding may explain: a part of the largest sum in the model, and a part of the batch gradient itself.
_ROUNDING = {torch.float64: (1e-13, 1e-8), torch.float32: (1e-6, 2e-3)}
_HALF_ROUNDING = (1e-3, 5e-2)


def check_losses(losses: object) -> Tensor:
    """Returns the losses if they are one real number for each sample, [B].

    Raises:
        TypeError: not a tensor.
        ValueError: another shape or dtype; the message says what to change in the loss function.
    """
    if not isinstance(losses, Tensor):
        raise TypeError(f"loss_fn must return a tensor with one loss per sample, [B]; got {type(losses).__name__}")
    if losses.ndim != 1:
        remedy = (
            "it is already reduced over the batch: pass reduction='none' to the criterion and reduce every "
            "dimension but the first"
            if losses.ndim == 0
            else "reduce every dimension but the first, for example with .flatten(1).sum(1) or .mean(1)"
        )
        raise ValueError(f"loss_fn must return one loss per sample, shape [B]; got {tuple(losses.shape)}: {remedy}")
    if not losses.is_floating_point():
        raise ValueError(f"losses must be real floating-point numbers; got dtype {losses.dtype}")
    return losses


def check_sum(
    blocks: Mapping[str, Sequence[Block]],
    batch_gradient: Mapping[str, Tensor | None],
    *,
    precision: torch.dtype,
    backend: str,
) -> None:
    """Raises `CheckError` unless Σ_b g_b equals the batch gradient for every parameter.

    Rounding is relative to what is summed, not to what cancellation leaves (the bias of attention keys has a
    gradient of zero, and z there is noise of larger terms elsewhere), so a small part of the largest sum in the
    model is allowed as well. One gradient of the summed loss is spent.
    """
    absolute, relative = _ROUNDING.get(precision, _HALF_ROUNDING)
    misses: dict[str, tuple[Tensor, Tensor]] = {}
    largest = torch.zeros((), dtype=torch.float64)
    for name, expected in batch_gradient.items():
        uses = blocks.get(name, ())
        if expected is None and not uses:
            continue
        total = None
        for block in uses:
            ones = torch.ones(block.batch, device=block.device, dtype=block.dtype.to_real())
            part = weighted_sum(block, ones)
            total = part if total is None else total + part
            bound = upper_bound(block).to(largest.device)
            # a factor may hold NaN or infinity where its partner is zero, or belong to a sample whose loss is NaN
            largest = torch.maximum(largest, torch.where(bound.isfinite(), bound, 0.0))
        if expected is None:
            expected = torch.zeros(uses[0].shape, dtype=uses[0].dtype, device=uses[0].device)
        expected = full_precision(expected.to_dense())
        if not bool(expected.isfinite().all()):
            continue  # NaN in a sample's loss: its row is NaN, the others are right
        norm = torch.linalg.vector_norm(expected).double().cpu()
        miss = norm if total is None else torch.linalg.vector_norm(total - expected).double().cpu()
        largest = torch.maximum(largest, norm)
        misses[name] = miss, norm
    for name, (miss, norm) in misses.items():
        if not bool(miss <= absolute * largest + relative * norm):
            raise CheckError(
                f"backend {backend!r} found per-sample gradients of {name!r} that do not add up to the batch "
                f"gradient (norm of the difference {float(miss):.3g}, of the batch gradient {float(norm):.3g}); "
                f"the result would be wrong. {_advice(backend)}"
            )


def upper_bound(block: Block) -> Tensor:
    """Returns an upper bound of ‖Σ_b g_b‖ that no cancellation lowers: the product of the factors' norms."""
    bound = torch.ones((), device=block.device, dtype=torch.float64)
    for factor in block.factors:
        if factor.is_floating_point() or factor.is_complex():
            bound = bound * torch.linalg.vector_norm(full_precision(factor)).double()
    return bound


def _advice(backend: str) -> str:
    if backend == "outputs":
        return (
            "Please report the model. check=False turns this check off, coupled='rows' reads the rows of models "
            "whose samples interact, backend='vmap' may cover the model."
        )
    return "Use backend='outputs', which covers every operation."
