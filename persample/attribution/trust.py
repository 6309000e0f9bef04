"""Whether separated samples at a node can be believed: what probing alone would let through.

Probing tells that one sample alone stands behind a row of z. That the row's gradient depends on no other sample, and
that the samples there are those of the batch, is asked of provenance and of the operation itself.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from persample.attribution.owner import Owner
from persample.attribution.separation import Separation
from persample.graph.calls import call_node
from persample.graph.nodes import Graph, Node, edge_shape
from persample.graph.provenance import Provenance

Meeting = tuple[Node, int, Node, int]
"""A node, the slot through which a parameter enters, and the edge (source, output) that feeds it."""


def in_doubt(node: Node, graph: Graph, known: Separation, provenance: Provenance | None, batch: int) -> bool:
    """Whether it is worth looking again at whether samples are apart at a node, see `separation.settle`.

    An operation on parameters alone sums over samples. Where the others' parts vanish in the rounding of one that is
    large, or numbers are few (whole ones), the sum can look like one sample's own: what seems apart there is looked at
    again, unless the graph proves it. Of an operation that read data it is what seems mixed, before it is refused.
    """
    if batch <= 1 or node is graph.root or not any(known.outputs[node]):
        return False
    if provenance is not None and provenance.saw_data(node, batch):
        return not known.separated(node)
    return known.separated(node) and not (known.proof is not None and known.proof.covers(node))


def came_in_unseen(
    meeting: Meeting, graph: Graph, region: set[Node], known: Separation, provenance: Provenance, batch: int
) -> bool:
    """Whether samples became apart where a parameter met none, on from operations that may have read data.

    What all samples share becomes a sample's own by meeting samples, or by being copied for each of them. Samples that
    come apart in another way were there before, and the operations that were passed mixed them.
    """
    node, _, source, output = meeting
    if node is graph.root or written_in_python(node) or provenance.met_samples(node, batch):
        return False
    entering = prod(edge_shape((source, output)))
    if any(z is not None and prod(z.shape) > entering for z in known.outputs[node]):
        return False
    mixed = (passed for passed in region if passed in known.owners and not known.separated(passed))
    return any(provenance.doubtful(passed) for passed in mixed)


def written_in_python(node: Node) -> bool:
    """Whether the node belongs to a custom `torch.autograd.Function`."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def mixes_inside(
    node: Node,
    zs: tuple[Tensor | None, ...],
    owners: tuple[Owner | None, ...],
    provenance: Provenance,
    batch: int,
) -> bool:
    """Whether a custom Function hands the gradient of one sample on to others, as far as its backward tells.

    Its parameters' rows can be told apart, as those of batch normalisation's weight, and depend on other samples.
    """
    if not written_in_python(node):
        return False
    mixed = False
    for output, (z, owner) in enumerate(zip(zs, owners, strict=True)):
        if z is None or owner is None or owner.axis is None:
            continue
        [alone] = owner.masked(torch.where(z.isfinite(), z, 1), slice(batch - 1, batch))
        with torch.no_grad():
            grads = call_node(node, [alone if k == output else None for k in range(len(zs))])
        others = owner.ids != batch - 1
        for grad, (source, _) in zip(grads, node.next_functions, strict=True):
            data = source is None or provenance.saw_data(source, batch)
            if data and isinstance(grad, Tensor) and grad.ndim >= z.ndim > 1 and grad.shape[owner.axis] == len(others):
                there = grad.movedim(owner.axis, 0)[others]
                mixed = mixed or bool((there.isfinite() & (there != 0)).any())  # zero times NaN says nothing
    return mixed


def normalises_over_samples(node: Node, known: Separation, provenance: Provenance) -> bool:
    """Whether the node is batch normalisation in training mode, over more than one sample.

    Its own weight and bias have rows that add up, but each of them depends on the other samples. Instance
    normalisation is the same operation with samples among the channels, which are apart; and so is the standardisation
    of a weight, which reads no data.
    """
    owner = known.owners[node][0]
    training = "BatchNorm" in node.name() and getattr(node, "_saved_training", True)
    return training and provenance.doubtful(node) and (owner is None or (owner.axis != 1 and owner.batch > 1))
