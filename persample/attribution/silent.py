"""Zeros of z that are nobody's, and are not nothing: 0 times an infinity that an operation has saved is NaN.

A sample whose loss has saturated, or whose units are dead, has gradients that are zero, and no number tells whose zeros
they are. As factors of finite numbers they add nothing to anybody's row. Where the other factor is not finite, the loop
over samples has NaN, and so must the row of the sample that the zeros belong to:

    zeros of z, a saved number that is not finite ─▶ does it show in the node's gradient?         two calls of the node
    it does ─▶ a pass with other numbers in place of all that is saved, of the zeros last
    `persample.attribution.stand_ins`
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from persample.attribution.owner import NOBODY, Owner, along_axis, arranged
from persample.attribution.probing import attribute, told_by
from persample.attribution.separation import Places, Separation, z_at
from persample.attribution.stand_ins import LEVELS, stand_ins
from persample.graph.calls import call_node
from persample.graph.nodes import Graph, Node
from persample.graph.saved import saved_by, unpacked_by_hooks


def claim(graph: Graph, losses: Tensor, slots: Mapping[Node, Collection[int]], known: Separation) -> list[Node]:
    """Finds whose such zeros are, and adds it to `known`; returns the nodes where that cannot be told.

    Args:
        graph: of the losses.
        losses: [B].
        slots: the nodes that parameters are used by, each with the slots through which they enter.
        known: has the owners at these nodes.
    """
    nodes = [node for node in slots if losses.shape[0] > 1 and _perhaps_not_finite(node)]
    for node in nodes:
        if known.proof is not None:
            proven = [known.proof.owner(node, k) if owner else None for k, owner in enumerate(known.owners[node])]
            pairs = zip(known.owners[node], proven, strict=True)
            known.owners[node] = tuple(old if new is None else new for old, new in pairs)
    nodes = [node for node in nodes if known.proof is None or not known.proof.covers(node)]
    zs = known.zs if known.keep else z_at(graph, losses, nodes)
    zeros = {
        node: [None if z is None else Zeros(z, o) for z, o in zip(zs[node], known.owners[node], strict=True)]
        for node in nodes
    }
    nodes = [node for node in nodes if _show(node, slots[node], zeros[node])]
    waiting = nodes
    for level in LEVELS:
        if waiting:
            places = Places(graph, losses, waiting, 1.0)
            with stand_ins(graph.order, level=level):
                found = attribute(places.backward, losses, watch=places.watch)
            zs_there, owners_there = places.by_node(found[0]), places.by_node(found[1])
            for node in waiting:
                for zero, other, others in zip(zeros[node], zs_there[node], owners_there[node], strict=True):
                    if zero is not None:
                        zero.add(other, others)
            waiting = [node for node in waiting if _show(node, slots[node], zeros[node])]
    for node in nodes:
        known.owners[node] = tuple(None if zero is None else zero.owner() for zero in zeros[node])

    def left(node: Node) -> bool:
        pairs = zip(zeros[node], known.owners[node], strict=True)
        return any(zero is not None and zero.left_by(owner) for zero, owner in pairs)

    return [node for node in waiting if left(node)]


class Zeros:
    """Whose the entries of one gradient are: of those that are zero, what other gradients tell."""

    def __init__(self, z: Tensor, owner: Owner | None) -> None:
        self._batch = 0 if owner is None else owner.batch
        nobodys = torch.full(z.shape, NOBODY, device=z.device)
        self.ids = nobodys if owner is None else torch.where(z != 0, owner.of_entries(z.shape), NOBODY)
        self._dtype = z.dtype

    def add(self, other: Tensor | None, others: Owner | None) -> None:
        """Takes another gradient, and its owner."""
        self.ids = told_by(self.ids, other, others)

    def alone(self) -> Tensor:
        """A gradient that is one where it is nobody's, and zero elsewhere."""
        return (self.ids == NOBODY).to(self._dtype)

    def owner(self) -> Owner:
        """The owner, as far as it is known."""
        return arranged(self.ids, self._batch)

    def left_by(self, owner: Owner | None) -> bool:
        """Whether entries are nobody's, also by their row, or rows can be read in several ways."""
        ways = sum(along_axis(self.ids, axis) is not None for axis in range(self.ids.ndim))
        return owner is None or (NOBODY in self.ids and (ways != 1 or NOBODY in owner.ids))


def _perhaps_not_finite(node: Node) -> bool:
    """Whether the node has saved what is not finite, or what cannot be looked at without being computed anew."""
    if unpacked_by_hooks([node]):
        return True
    numbers = [each for each in saved_by([node]) if each.is_floating_point() or each.is_complex()]
    return any(each.layout != torch.strided or not bool(each.isfinite().all()) for each in numbers)


def _show(node: Node, slots: Collection[int], zeros: Collection[Zeros | None]) -> bool:
    """Whether what is not finite has a part in the node's gradient, as far as that comes from zeros of nobody."""
    cotangents = [None if zero is None else zero.alone() for zero in zeros]
    if not any(cotangent is not None and bool(cotangent.any()) for cotangent in cotangents):
        return False
    found = []
    for seed in (0, 1):
        with torch.no_grad(), stand_ins([node], seed=seed):
            found.append(call_node(node, cotangents))
    pairs = [(found[0][slot], found[1][slot]) for slot in slots]
    return any(a is not None and b is not None and not torch.equal(a.to_dense(), b.to_dense()) for a, b in pairs)
