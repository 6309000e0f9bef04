"""How a layer-wise method turns statistics into a direction: what KFAC and its kin define, one file each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fngd.kronecker.processes import Found, Ranks
from fngd.kronecker.statistics import Factors, Statistics

State = dict[str, Tensor]
"""Tensors of one layer by name."""


class Method(ABC):
    """A layer-wise method. Pure: it keeps nothing but its options."""

    @abstractmethod
    def collect(self, factors: Factors, *, bias: bool, convolution: bool, random: torch.Generator) -> Statistics:
        """Returns what to remember of a backward pass."""

    @abstractmethod
    def combine(self, first: Statistics, second: Statistics) -> Statistics:
        """Returns the statistics of both backward passes together."""

    @abstractmethod
    def joined(self, found: Found, ranks: Ranks) -> dict[str, Statistics]:
        """Returns the statistics of the batch that the processes have together, the same in each of them."""

    @abstractmethod
    def update(self, old: State | None, new: Statistics, reduction: str) -> State:
        """Returns the running factors and "count"; `old` where the new statistics are not finite."""

    @abstractmethod
    def invert(self, running: State, damping: float, before: State | None) -> State:
        """Returns what `direction` needs; `before`: what it returned last time."""

    @abstractmethod
    def direction(self, inverse: State, grad: Float[Tensor, "groups out inp"], damping: float) -> Tensor:
        """Returns the preconditioned gradient, of the same shape."""

    def sizes(self, running: State) -> tuple[int, int, int]:
        """Returns (groups, outputs, inputs) of the gradient that running factors are for; a bias is an input."""
        return running["inputs"].shape[0], running["outputs"].shape[-1], running["inputs"].shape[-1]

    def refine(self, step: Step) -> None:
        """Puts into the inverses what takes them and the statistics of this step; most methods have no such part."""
        return


@dataclass(frozen=True)
class Step:
    """States of layers in a step whose inverses are there.

    found      statistics of the layers that have new ones, of all processes together; what is `kept`: of this process
    ranks      the processes that take part; None: one alone
    reduction  of the training loss, "mean" or "sum"
    """

    inverses: dict[str, State]
    running: Mapping[str, State]
    found: Found
    ranks: Ranks | None
    reduction: str
