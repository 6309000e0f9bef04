"""Checks: what is asked of losses before, and of per-sample gradients after the computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor

from persample.blocks.reductions import full_precision, weighted_sum
from persample.blocks.types import Block
from persample.capture.types import Captured
from persample.errors import CheckError, PerSampleError
from persample.graph.nodes import Graph, trace

# What rounding may explain: a part of the largest sum in the model, and a part of the batch gradient itself.
_ROUNDING = {torch.float64: (1e-13, 1e-8), torch.float32: (1e-6, 2e-3)}
_HALF_ROUNDING = (1e-3, 5e-2)
STEPS = 16
"""And so many times the smallest number of the format in each entry: what is as small has no digits to scale."""
PIECE = 2**20
"""Bytes of a sum that are compared at a time."""


def check_losses(losses: object) -> Tensor:
    """Returns the losses if they are one real number for each sample, [B].

    Raises:
        TypeError: not a tensor.
        ValueError: another shape or dtype; the message says what to change in the loss function.
    """
    if not isinstance(losses, Tensor):
        got = f"{type(losses).__name__}: {_tensor(losses)}"
        raise TypeError(f"loss_fn must return a tensor with one loss per sample, [B]; got {got}")
    if losses.ndim != 1:
        remedy = (
            "it is already reduced over the batch: pass reduction='none' to the criterion and reduce every "
            "dimension but the first; a model that computes its loss from labels among its inputs returns the mean: "
            "leave the labels out, and compute the losses from its outputs"
            if losses.ndim == 0
            else "reduce every dimension but the first, for example with .flatten(1).sum(1) or .mean(1). For a "
            "gradient of every entry there are persample.jacobian(model, inputs) and "
            "persample.grad(losses.flatten(), params)"
        )
        raise ValueError(f"loss_fn must return one loss per sample, shape [B]; got {tuple(losses.shape)}: {remedy}")
    if not losses.is_floating_point():
        raise ValueError(f"losses must be real floating-point numbers; got dtype {losses.dtype}")
    return losses


def _tensor(losses: object) -> str:
    """How to return a tensor in place of something else."""
    if losses is None:
        return "let it end with 'return losses'"
    if isinstance(losses, (list, tuple, Mapping)):
        return "return the losses alone; torch.stack makes a tensor of a list of them"
    return "compute it by operations of torch; what .item() or NumPy return has no gradient"


def check_graph(losses: Tensor, parameters: Mapping[str, Tensor], graph: Graph | None = None) -> None:
    """Refuses losses that no gradient can be had of, as `losses.sum().backward()` does, or none but zeros.

    A parameter that no loss depends on has a gradient of zero; losses that depend on none of them are a mistake.

    Args:
        losses: [B].
        parameters: to differentiate for.
        graph: of the losses, where it is there already.

    Raises:
        PerSampleError: the losses have no graph, or one without the parameters.
    """
    if not parameters:
        return
    if not losses.requires_grad:
        raise PerSampleError(
            f"the losses do not require a gradient: {tuple(losses.shape)} numbers without a graph, though the "
            f"parameters to differentiate for ({len(parameters)}) do. Compute them from the model's output with "
            "gradients enabled: no torch.no_grad, .detach(), .item() or conversion to NumPy on the way; and let "
            "parameters require a gradient that the model uses"
        )
    leaves = {id(losses)} if losses.is_leaf else (trace(losses) if graph is None else graph).leaves
    if not any(id(parameter) in leaves for parameter in parameters.values()):
        names = ", ".join(map(repr, [*parameters][:3])) + (", ..." if len(parameters) > 3 else "")
        raise PerSampleError(
            f"the losses depend on none of the parameters to differentiate for ({len(parameters)}: {names}), but on "
            f"{len(leaves)} other tensors that require a gradient: every row would be zero. Did you wrap or copy the "
            "model, so that the losses are computed with other parameters? Give those; or let parameters require a "
            "gradient that the model uses"
        )


def distinct_weights(losses: Tensor) -> Tensor:
    """Weights [B] between 1/2 and 3/2, all different and in no simple relation: multiples of the golden ratio."""
    numbers = torch.arange(1, losses.shape[0] + 1, dtype=torch.float64, device=losses.device)
    return (0.5 + (numbers * 0.6180339887498949) % 1).to(losses.dtype)


def binary_weights(losses: Tensor) -> Tensor:
    """Weights [B] among 1/4, 1/2, 1 and 2 in no regular order: they scale without rounding, in any precision."""
    return torch.exp2(torch.floor(4 * (distinct_weights(losses.double()) - 0.5)) - 2).to(losses.dtype)


class SumCheck:
    """Compares Σ_b w_b g_b with the gradient of Σ_b w_b ℓ_b, parameter by parameter as their blocks come.

    With weights w all different it sees more than the plain sum, at the same price: rows that add up and yet are mixed
    up among the samples, or that vanish in the sum because a mean over the batch is subtracted.
    Rounding is relative to what is summed, not to what cancellation leaves (the bias of attention keys has a
    gradient of zero, and z there is noise of larger terms elsewhere), so a small part of the largest sum in the
    model is allowed as well.

    Args:
        weights: w, [B].
        batch_gradient: of Σ_b w_b ℓ_b, by parameter; emptied, so that each is freed once it has been compared.
    """

    def __init__(self, weights: Tensor, batch_gradient: dict[str, Tensor | None]) -> None:
        self._weights = weights
        self._gradient = batch_gradient
        self._names = list(batch_gradient)
        self._found: dict[str, tuple[Tensor, Tensor, int]] = {}
        self._largest = torch.zeros((), dtype=torch.float64)

    def add(self, name: str, uses: Sequence[Block | Captured]) -> None:
        """Takes the blocks of one parameter, all of them."""
        total = None
        for use in uses:
            block = use if isinstance(use, Block) else use.block
            part = weighted_sum(block, self._weights.to(device=block.device, dtype=block.dtype.to_real()))
            total = part if total is None else total + part
            bound = upper_bound(block).to(self._largest.device)
            # a factor may hold NaN or infinity where its partner is zero, or belong to a sample whose loss is NaN
            self._largest = torch.maximum(self._largest, torch.where(bound.isfinite(), bound, 0.0))
        if name in self._gradient:
            self._meet(name, total)

    def compare(self, *, precision: torch.dtype, backend: str) -> None:
        """Raises `CheckError` unless the sums are the gradient of the weighted losses."""
        for name, (miss, norm) in self.misses(precision).items():
            raise sum_error(name, miss, norm, precision=precision, backend=backend)

    def misses(self, precision: torch.dtype) -> dict[str, tuple[float, float]]:
        """The parameters whose sum is another one: norms of the difference and of the batch gradient."""
        for name in list(self._gradient):  # those without a block
            self._meet(name, None)
        absolute, relative = _ROUNDING.get(precision, _HALF_ROUNDING)
        smallest = torch.finfo(precision).tiny * torch.finfo(precision).eps
        missed = {}
        for name in self._names:
            miss, norm, entries = self._found.get(name, (0.0, 0.0, 0))
            if not bool(miss <= absolute * self._largest + relative * norm + STEPS * smallest * sqrt(entries)):
                missed[name] = float(miss), float(norm)
        return missed

    def _meet(self, name: str, total: Tensor | None) -> None:
        gradient = self._gradient.pop(name)
        if gradient is not None:
            expected = full_precision(gradient.to_dense())
        elif total is not None:
            expected = torch.zeros_like(total)
        else:
            return
        norm = torch.linalg.vector_norm(expected).double().cpu()
        if not bool(norm.isfinite()) and not bool(expected.isfinite().all()):
            # a sample that is not finite: what it leaves finite can be compared
            finite = expected.isfinite() if total is None else expected.isfinite() & total.isfinite()
            expected = torch.where(finite, expected, 0)
            total = None if total is None else torch.where(finite, total, 0)
            norm = torch.linalg.vector_norm(expected).double().cpu()
        miss = norm if total is None else distance(total, expected).cpu()
        self._largest = torch.maximum(self._largest, norm)
        self._found[name] = miss, norm, expected.numel()


def distance(found: Tensor, expected: Tensor) -> Tensor:
    """The norm of the difference of two tensors of one shape, in double precision; a piece at a time, for memory."""
    if found.ndim == 0 or found.nbytes <= PIECE:
        return torch.linalg.vector_norm(found - expected).double()
    rows = max(1, PIECE * len(found) // found.nbytes)
    pairs = zip(found.split(rows), expected.split(rows), strict=True)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(a - b).double() for a, b in pairs]))


def sum_error(name: str, miss: float, norm: float, *, precision: torch.dtype, backend: str) -> CheckError:
    """The error for a parameter among the `misses`."""
    return CheckError(
        f"backend {backend!r} found per-sample gradients of {name!r} that do not add up to the batch gradient (norm of "
        f"the difference {miss:.3g}, of the batch gradient {norm:.3g}); the result would be wrong. "
        f"{_advice(backend, precision)}"
    )


def check_sum(
    blocks: Mapping[str, Sequence[Block]],
    batch_gradient: Mapping[str, Tensor | None],
    *,
    precision: torch.dtype,
    backend: str,
) -> None:
    """Raises `CheckError` unless Σ_b g_b equals the batch gradient for every parameter, see `SumCheck`."""
    check = SumCheck(torch.ones(next((found[0].batch for found in blocks.values() if found), 0)), dict(batch_gradient))
    for name, found in blocks.items():
        check.add(name, found)
    check.compare(precision=precision, backend=backend)


def upper_bound(block: Block) -> Tensor:
    """Returns an upper bound of ‖Σ_b g_b‖ that no cancellation lowers: the product of the factors' norms."""
    bound = torch.ones((), device=block.device, dtype=torch.float64)
    for factor in block.factors:
        if factor.is_floating_point() or factor.is_complex():
            bound = bound * torch.linalg.vector_norm(full_precision(factor)).double()
    return bound


def _advice(backend: str, precision: torch.dtype) -> str:
    if backend == "outputs":
        return (
            "Please report the model. check=False turns this check off, coupled='rows' reads the rows of models "
            "whose samples interact, backend='vmap' may cover the model."
        )
    if precision in (torch.float16, torch.bfloat16):
        return (
            f"Or it is the batch gradient that is wrong: autograd may add thousands of numbers in {precision} and lose "
            "those that are small beside their sum. Use backend='outputs', which tells the two apart, or float32."
        )
    return "Use backend='outputs', which covers every operation."
