"""One backward pass by a plan: a parameter's blocks are handed over as soon as the pass has met its last use.

    losses ─▶ backward pass ─▶ a node with uses: z arrives ─▶ blocks ─▶ last use of a parameter: take(name, uses)

The pass frees what it has passed (`persample.graph.backward`), so what is held at any moment is what `take` keeps, not
z of every operation beside the whole graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from persample.attribution.owner import Owner
from persample.attribution.uses import Use
from persample.blocks.types import Block
from persample.capture.assemble import capture_use, merged
from persample.capture.types import Captured
from persample.graph.backward import ends, watched
from persample.graph.calls import outside
from persample.graph.nodes import Graph, Node
from persample.graph.recomputed import Beside
from persample.rules import Site, build

Take = Callable[[str, tuple[Captured, ...]], None]
"""Gets the uses of one parameter, all of them."""
Place = tuple[Node, int]
"""A node and the slot that a parameter enters."""


class Stream:
    """The pass itself; `run` does it once."""

    def __init__(
        self,
        graph: Graph,
        uses: Mapping[str, Sequence[Use]],
        owners: Mapping[Node, tuple[Owner | None, ...]],
        batch: int,
        take: Take,
        check: Callable[[Site, Block], None] | None = None,
        checked: int = 0,
        again: Sequence[Node] = (),
    ) -> None:
        self._graph, self._uses, self._owners, self._batch, self._take = graph, uses, owners, batch, take
        places = list(dict.fromkeys((use.node, use.slot) for found in uses.values() for use in found))
        self._slots: dict[Node, list[int]] = {}
        for node, slot in places:
            self._slots.setdefault(node, []).append(slot)
        self._check = check
        self._again = again
        self._beside = Beside() if again else None
        self._checked = places[checked % len(places)] if places else None
        self._waiting = {name: {(use.node, use.slot) for use in found} for name, found in uses.items()}
        self._names: dict[Place, list[str]] = {}
        for name, awaited in self._waiting.items():
            for place in awaited:
                self._names.setdefault(place, []).append(name)
        self._found: dict[str, dict[Place, tuple[Block, str]]] = {name: {} for name in uses}

    @torch.no_grad()
    def run(self, losses: Tensor, *, retain_graph: bool = False) -> None:
        """Runs the pass."""
        last, ones = ends(self._graph, self._slots), torch.ones_like(losses)
        met = dict.fromkeys((*self._slots, *self._again)) if retain_graph else self._slots
        watched(self._graph, losses, ones, met, last, self._arrive, retain_graph=retain_graph, again=self._again)
        for name in list(self._waiting):  # those with a use that no loss depends on, after all
            self._hand_over(name)

    def _arrive(self, node: Node, zs: tuple[Tensor | None, ...]) -> None:
        """Builds the blocks of a node from z, if a parameter enters it."""
        if self._beside is None:
            self._build(node, zs)
        else:
            with self._beside.reading():
                self._build(node, zs)
            self._beside.drop(node)

    def _build(self, node: Node, zs: tuple[Tensor | None, ...]) -> None:
        if node not in self._slots or all(z is None for z in zs):
            return
        shared: dict[Hashable, Any] = {}
        for slot in self._slots[node]:
            site = Site(node, slot, zs, self._owners[node], self._batch, shared)
            block, rule = build(site)
            if self._check is not None and (node, slot) == self._checked:
                if self._beside is None:
                    self._check(site, block)
                else:
                    outside(self._check, site, block)  # it reads what it checks as often as it likes
            for name in self._names[node, slot]:
                self._found[name][node, slot] = block, rule
                self._waiting[name].discard((node, slot))
                if not self._waiting[name]:
                    self._hand_over(name)

    def _hand_over(self, name: str) -> None:
        found = self._found.pop(name)
        del self._waiting[name]
        uses = self._uses[name]
        self._take(name, merged([capture_use(u, *found[u.node, u.slot]) for u in uses if (u.node, u.slot) in found]))
