"""Samples that influence each other: the error that names where, and the row reading for those who want it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from persample.attribution import Output, Owner
from persample.checks import several_losses
from persample.errors import CoupledSamplesError, UnderflowError
from persample.graph import Graph, Node
from persample.provenance import Provenance


def row_owner(z: Tensor | Output, batch: int) -> Owner | None:
    """Returns the owner in the row reading, in which row b of dimension 0 belongs to sample b, or None.

    With operations that couple samples, what flows through sample b's rows is not the gradient of sample b's
    loss, but it is what the FNGD paper uses with batch normalisation, and it still adds up to the batch gradient.
    """
    if not z.shape or z.shape[0] != batch:
        return None
    return Owner(0, torch.arange(batch, device=z.device), batch)


def underflow_error(name: str, zs: Sequence[Tensor | None]) -> UnderflowError:
    """The error for parameter `name`, where z is so small that its digits are lost and samples cannot be told apart."""
    present = [z for z in zs if z is not None]
    largest = max(float(z.abs().nan_to_num(0.0, 0.0, 0.0).max()) for z in present if z.numel())
    lowest = min((z.dtype for z in present), key=lambda dtype: torch.finfo(dtype).max)
    other = " or compute in bfloat16" if lowest is torch.float16 else ""
    return UnderflowError(
        f"the gradients at the operation that uses {name!r} are so small ({largest:.1g} at most) that {lowest} keeps "
        f"few digits of them (below {torch.finfo(lowest).tiny:.1g} it loses them one by one): too few to tell samples "
        "apart, and too few for an exact result. Samples are apart where the losses are larger: multiply the losses by "
        f"a power of two such as 2**16, as loss scaling does, and divide the gradients by it{other}"
    )


def coupled_error(
    node: Node,
    graph: Graph,
    separated: Callable[[Node], bool],
    provenance: Provenance,
    name: str,
    coupled: str,
    batch: int,
    half: torch.dtype | None = None,
) -> CoupledSamplesError:
    """The error for parameter `name`, used by `node`, with the first operation behind it at which samples mix.

    `half`: the half precision that z has there, None for another one.
    """
    behind, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current not in behind:
            behind.add(current)
            stack.extend(consumer for consumer, _, _ in graph.consumers.get(current, ()))
    culprit = node if separated(node) else None
    for current in sorted(behind, key=graph.order.__getitem__, reverse=True):
        # from the loss back: the first node whose samples mix feeds the operation that mixes them
        if culprit is None and not separated(current):
            culprit = next((c for c, _, _ in graph.consumers.get(current, ()) if separated(c)), current)
            break
    if culprit is None:
        where = "in the loss"
    else:
        path = provenance.module(culprit)
        layer = "in the loss" if path is None else f"in layer {path!r}" if path else "in the model's own forward"
        where = f"{layer} (operation {culprit.name().removesuffix('Backward0')})"
    if coupled == "rows":
        return CoupledSamplesError(
            f"the samples of this batch influence each other, {where}, and the operation that uses {name!r} has no "
            "rows to read: dimension 0 of its output is not the batch. The row reading needs the batch first."
        )
    shared = provenance.perhaps_shared(node, batch)
    hint = (
        ""
        if shared is None
        else f"If the input of shape {tuple(shared.shape)} holds no samples but is shared by all of them (positions, a "
        f"mask, a grid), give it a first dimension of one: {(1, *shared.shape)}. "
    )
    if half is not None:
        hint += f"Where large terms cancel, rounding in {half} can look like that; the same model in float32 tells. "
    several = several_losses(provenance.first_size(), batch)
    told = f"the samples of this batch influence each other, {where}, so {name!r} has no gradient per sample. "
    return CoupledSamplesError(told + (f"{several}." if several else hint + advice(where)))


def advice(where: str) -> str:
    """What to do about samples that influence each other at an operation."""
    if "BatchNorm" in where:
        there = "put batch normalisation in eval mode or use GroupNorm"
    elif where.startswith("in the loss"):
        there = (
            "do not normalise a loss over the batch, and for one that compares samples (contrastive) take the gradient "
            "of each loss, persample.grad(losses, params)"
        )
    else:
        there = "let no operation of the model go across samples"
    return (
        f"Per-sample gradients exist where each loss depends on its own sample alone: {there}. coupled='rows' reads "
        "the rows of each layer instead, as the FNGD paper does with batch normalisation."
    )
