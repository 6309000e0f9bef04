"""Samples that influence each other: the error that names where, and the row reading for those who want it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from persample.attribution.owner import Output, Owner
from persample.errors import CoupledSamplesError, UnsupportedError
from persample.graph.nodes import Graph, Node
from persample.graph.provenance import Provenance


def row_owner(z: Tensor | Output, batch: int) -> Owner | None:
    """Returns the owner in the row reading, in which row b of dimension 0 belongs to sample b, or None.

    With operations that couple samples, what flows through sample b's rows is not the gradient of sample b's
    loss, but it is what the FNGD paper uses with batch normalisation, and it still adds up to the batch gradient.
    """
    if not z.shape or z.shape[0] != batch:
        return None
    return Owner(0, torch.arange(batch, device=z.device), batch)


def not_finite_error(what: str) -> UnsupportedError:
    """The error for a parameter, where z is not finite and samples cannot be told apart."""
    return UnsupportedError(
        f"the gradients at the operation that uses {what} are not finite for some sample, and whose they are cannot "
        "be told: the samples influence each other, or operations keep their tensors where they cannot be read. Leave "
        "the samples out that are not finite (losses.isfinite()), or call with each of them alone"
    )


def several_losses(samples: int | None, losses: int) -> str:
    """What to say of several losses for each sample, as of tokens or outputs; "" where there is one."""
    if not samples or losses <= samples or losses % samples:
        return ""
    return (
        f"There are {losses} losses for {samples} samples, by dimension 0 of the inputs: {losses // samples} for each, "
        "as of its tokens or outputs. For the gradient of every one of them there is persample.grad(losses, params); "
        f"for one of each sample add them up, as by losses.view({samples}, -1).sum(1) where those of a sample are "
        "neighbours"
    )


def coupled_error(
    node: Node,
    graph: Graph,
    separated: Callable[[Node], bool],
    provenance: Provenance,
    name: str,
    coupled: str,
    batch: int,
) -> CoupledSamplesError:
    """The error for parameter `name`, used by `node`, with the first operation behind it at which samples mix."""
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
