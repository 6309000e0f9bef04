"""Which parameter group each layer is in, and so whether it is preconditioned, and at which rate."""

from __future__ import annotations

from typing import Any

from fngd.optim.layers import members
from persample import Reweighting

Groups = list[dict[str, Any]]


class LayerGroups:
    """The groups of the layers of a handle, kept by number: loading a state makes new groups, and FSDP swaps
    parameters.

    A function is known once it has been called.
    """

    def __init__(self, handle: Reweighting) -> None:
        self._handle = handle

    def find_groups(self, groups: Groups) -> None:
        """Notes each layer's group."""
        self._numbers = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
        self._group_of: dict[str, int | None] = {}
        for path in self._handle.explain():
            self._known(path)

    def _known(self, layer: str) -> bool:
        if layer not in self._group_of:
            weight, _ = members(self._handle, layer)
            if weight is None:
                return False
            self._group_of[layer] = self._numbers.get(id(weight.param))
        return True

    def chosen(self, layer: str, groups: Groups) -> bool:
        """Whether the layer is to be preconditioned: not where another optimiser steps its weight."""
        if not self._known(layer):
            return False
        number = self._group_of[layer]
        return number is not None and bool(groups[number].get("precondition", True))

    def rate(self, layer: str, groups: Groups) -> Any:
        """The learning rate of a layer; 0 where it has none."""
        number = self._group_of.get(layer)
        return 0.0 if number is None else groups[number].get("lr", 0.0)

    def explained(self, layer: str, reason: str, groups: Groups) -> str:
        """Why the layer is plain for the sake of its groups, else the reason as it is."""
        if not reason.startswith("reweighted"):
            return reason
        if not self._known(layer):
            return "plain: its bias is no parameter, nor rows of one"
        if self._group_of[layer] is None:
            return "plain: its weight is in no parameter group of this optimiser"
        if not self.chosen(layer, groups):
            return "plain: its weight is in a group with precondition=False"
        return reason
