"""Rules: from one use of a parameter, by kind of autograd node, to a block.

A rule gets a `Site`, the place where a parameter meets the data, and returns a block whose rows have the shape
of the tensor that enters the node's slot; or None where it does not apply, and the generic rule takes over.
The generic rule calls the node itself, so no kind of operation needs a rule to be exact, only to be fast.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from persample.attribution.owner import Owner
from persample.blocks.types import Block
from persample.graph.nodes import Node, edge_shape

__all__ = ["ALLOWANCES", "RULES", "Rule", "Site", "allowance", "build", "rule"]


@dataclass(frozen=True)
class Site:
    """One use of a parameter: slot `slot` of `node`, with z and its owner for each of the node's outputs."""

    node: Node
    slot: int
    zs: tuple[Tensor | None, ...]
    owners: tuple[Owner | None, ...]
    batch: int
    shared: dict[Hashable, Any] = field(default_factory=dict)
    """What rules for several slots of the node have in common."""
    read: dict[str, Any] | None = None
    """What was read of the node before, for other z; None: it is read each time."""

    @property
    def z(self) -> Tensor:
        """z of the first output."""
        z = self.zs[0]
        if z is None:
            raise LookupError(f"{self.node.name()}: nothing depends on output 0")
        return z

    @property
    def only_output(self) -> bool:
        """Whether z is that of the first output, and something depends on no other."""
        zs = self.zs
        return bool(zs) and zs[0] is not None and (len(zs) == 1 or all(z is None for z in zs[1:]))

    @property
    def owner(self) -> Owner:
        """Owner of the first output's entries."""
        owner = self.owners[0]
        if owner is None:
            raise LookupError(f"{self.node.name()}: nothing depends on output 0")
        return owner

    def saved(self, name: str, default: Any = None) -> Any:
        """An attribute that autograd saved for the node; tensors come without the graph behind them."""
        if self.read is not None and name in self.read:
            return self.read[name]
        value = getattr(self.node, f"_saved_{name}", default)
        value = value.detach() if isinstance(value, Tensor) else value
        if self.read is not None:
            self.read[name] = value
        return value

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that enters the slot."""
        return edge_shape(self.node.next_functions[self.slot])


Rule = Callable[[Site], Block | None]
RULES: dict[str, Rule] = {}


def rule(*kinds: str) -> Callable[[Rule], Rule]:
    """Registers a rule for autograd nodes of these kinds, such as "AddmmBackward0"."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, function))
        return function

    return add


Allowance = Callable[[Site], float]
ALLOWANCES: dict[str, Allowance] = {}


def allowance(*kinds: str) -> Callable[[Allowance], Allowance]:
    """Registers, for kinds whose gradient has a difference as a factor, what rounding of that makes of the gradient.

    A norm. It is relative to what is subtracted: where nothing but rounding is left of the difference, so it is of the
    gradient, and rule and operation need not agree in it.
    """

    def add(function: Allowance) -> Allowance:
        ALLOWANCES.update(dict.fromkeys(kinds, function))
        return function

    return add


def build(site: Site) -> tuple[Block, str]:
    """Returns the block of a site and the name of the rule that built it."""
    function = RULES.get(site.node.name())
    if function is not None and site.only_output:
        block = function(site)
        if block is not None:
            return block, function.__name__
    from persample.rules import generic

    return generic.generic(site), "generic"


def _load() -> None:
    """Imports the modules that register rules."""
    from persample.rules import convolution, elementwise, embedding, grouped, linear, normalisation

    del convolution, elementwise, embedding, grouped, linear, normalisation


_load()
