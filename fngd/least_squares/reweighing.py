"""Weights of single residuals that follow the residuals from step to step: `GaussNewton(reweigh=…)`.

    symbol    meaning                                                             shape
    r_g       residuals of group g, without a graph                               [B_g]
    ω_g       weights; L = ½ Σ_g w_g·mean_b ω_gb r_gb²                            [B_g], or a number
    λ, γ      weights that are remembered, and the part that is kept              [B_g]

A reweighing is a function (residuals, state) -> (weights, state). Both are dicts by group; the state begins empty,
holds tensors, and is saved with the optimiser's. It is asked once a step, at the step's first call of the closure, and
ω is constant in the step: a Gauss–Newton step on a weighted problem, of which search, gain ratio and damping see one
loss.
Groups that are not named have ω = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Groups = Mapping[str, Tensor]
Weights = Mapping[str, Tensor | float]
State = Mapping[str, Tensor]
Reweigh = Callable[[Groups, State], tuple[Weights, State]]


@dataclass(frozen=True)
class ResidualAttention:
    """Points whose residuals stay large weigh more: λ ← γλ + (1 − γ)|r|/max|r| from λ = 1, ω = λ²/mean λ².

    Arguments:
        memory: γ in [0, 1); 0 follows the residuals of the step alone.

    Residual b must be of the same point from step to step; where points are drawn anew call `opt.forget_weights()`, or
    use memory=0. A group whose number of points changes begins again by itself. Source: Anagnostopoulos et al.,
    "Residual-based attention in physics-informed neural networks" (2024), with λ up to a factor, which the mean takes
    out, so that `weights=` keep their meaning.

    >>> weights, _ = ResidualAttention(memory=0.0)({"inside": torch.tensor([1.0, -3.0])}, {})
    >>> weights["inside"]
    tensor([0.2000, 1.8000])
    """

    memory: float = 0.9

    def __post_init__(self) -> None:
        _part(self, "memory", self.memory)

    def __call__(self, residuals: Groups, state: State) -> tuple[Groups, State]:
        """Returns ω and λ of every group."""
        kept = {}
        for name, r in residuals.items():
            size = r.abs()
            largest = size.amax()
            share = torch.where(largest > 0, size / largest, torch.ones_like(size))
            before = state.get(name)
            before = torch.ones_like(size) if before is None or before.shape != size.shape else before.to(size)
            kept[name] = self.memory * before + (1 - self.memory) * share
        return {name: each.square() / each.square().mean() for name, each in kept.items()}, kept


@dataclass(frozen=True)
class GroupBalance:
    """All groups have an equal part in the loss, times w_g: ω_g = mean_h m_h / m_g, m ← γm + (1 − γ)·mean r².

    Arguments:
        memory: γ in [0, 1).
        largest: bound of ω_g, ≥ 1; where one group can be fitted exactly and another cannot (noisy data), the ratio
            would grow without end.

    It is the fixed point of the likelihood with an unknown noise in each group, whose loss is Σ_g log mean r_g²
    (Kendall, Gal, Cipolla, "Multi-task learning using uncertainty", 2018).

    >>> weights, _ = GroupBalance()({"inside": torch.tensor([3.0, 3.0]), "edge": torch.tensor([1.0])}, {})
    >>> {name: weight.item() for name, weight in weights.items()}  # (9 + 1)/2 over 9 and 1
    {'inside': 0.5555555820465088, 'edge': 5.0}
    """

    memory: float = 0.9
    largest: float = 1e4

    def __post_init__(self) -> None:
        _part(self, "memory", self.memory)
        if not 1 <= self.largest < math.inf:
            raise ValueError(f"GroupBalance largest={self.largest!r}; it must be a number ≥ 1")

    def __call__(self, residuals: Groups, state: State) -> tuple[Groups, State]:
        """Returns ω_g and m_g of every group."""
        kept = {}
        for name, r in residuals.items():
            now = r.square().mean()
            kept[name] = now if name not in state else self.memory * state[name].to(now) + (1 - self.memory) * now
        mean = torch.stack(list(kept.values())).mean()
        return {name: _ratio(mean, each).clamp(max=self.largest) for name, each in kept.items()}, kept


@dataclass(frozen=True, eq=False)
class CausalWeights:
    """For equations in time: a moment weighs little while earlier ones are not solved, ω_i = exp(−ε Σ_{k<i} L_k).

    L_k is the mean square of the residuals in slice k of the time. Without it a network can satisfy the equation late
    in time by a solution that does not follow from the initial condition. Source: Wang, Sankaran, Perdikaris,
    "Respecting causality for training physics-informed neural networks" (2024).

    Arguments:
        times: t of each residual, [B_g], by name of the group; or a function of no arguments that returns that, for
            points that are drawn anew. Groups that are not named, as initial conditions, have ω = 1.
        epsilon: ε·Σ_k L_k in the first step, > 0, which makes ε free of units: the last slice begins at e^−epsilon or
            a little more.
        slices: of equal length between the first and the last time.
        growth: ε is multiplied by it where all ω > `reached`, so that causality holds at the next smaller size of
            residuals, too; 1 for a constant ε.
        reached: in (0, 1).

    >>> causal = CausalWeights({"inside": torch.tensor([0.0, 0.4, 1.0])}, epsilon=1.0, slices=2)
    >>> weights, _ = causal({"inside": torch.tensor([1.0, 2.0, 3.0])}, {})  # L = (1 + 4)/2, 9
    >>> weights["inside"]  # the last: exp(−2.5/11.5)
    tensor([1.0000, 1.0000, 0.8046])
    """

    times: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]
    epsilon: float = 10.0
    slices: int = 32
    growth: float = 10.0
    reached: float = 0.99

    def __post_init__(self) -> None:
        if not (isinstance(self.times, Mapping) or callable(self.times)):
            raise TypeError(
                f"CausalWeights times is {type(self.times).__name__}; give a dict, name of a residual group -> its "
                "times [B], or a function that returns it (a closure that returns one tensor has the group 'residual')"
            )
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"CausalWeights epsilon={self.epsilon!r}; it must be a number > 0")
        if not (isinstance(self.slices, int) and self.slices >= 2):
            raise ValueError(f"CausalWeights slices={self.slices!r}; it must be an integer ≥ 2")
        if not (1 <= self.growth < math.inf and 0 < self.reached < 1):
            raise ValueError(
                f"CausalWeights growth={self.growth!r}, reached={self.reached!r}; 1 ≤ growth, 0 < reached < 1"
            )

    def __call__(self, residuals: Groups, state: State) -> tuple[Groups, State]:
        """Returns ω of the groups that have times, and ε."""
        times = self.times() if callable(self.times) else self.times
        found, sums = {}, {}
        for name, t in times.items():
            if name not in residuals or t.numel() != len(residuals[name]):
                there = {group: len(r) for group, r in residuals.items()}
                raise ValueError(
                    f"CausalWeights has {t.numel()} times for the group {name!r}; the closure returned {there}. Give "
                    "one time for each residual, by the name of its group"
                )
            found[name], sums[name] = self._slices(t.detach().flatten(), residuals[name])
        if not found:
            raise ValueError("CausalWeights has times for no group; give times={'interior': t}")
        total = torch.stack([each[-1] for each in sums.values()]).amax()
        epsilon = state["epsilon"].to(total) if "epsilon" in state else _ratio(total.new_tensor(self.epsilon), total)
        weights = {name: torch.exp(-epsilon * sums[name][:-1]) for name in found}
        least = torch.stack([each[-1] for each in weights.values()]).amin()
        grown = (epsilon * self.growth).clamp(max=torch.finfo(epsilon.dtype).max ** 0.5)
        kept = torch.where(least > self.reached, grown, epsilon)
        return {name: weights[name][place] for name, place in found.items()}, {"epsilon": kept}

    def _slices(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """The slice of each residual, and Σ_{k<i} L_k for i = 0 … slices."""
        first, last = t.amin(), t.amax()
        place = ((t - first) / (last - first).clamp_min(torch.finfo(t.dtype).tiny) * self.slices).long()
        place = place.clamp(0, self.slices - 1).to(r.device)
        zeros = r.new_zeros(self.slices)
        squares = zeros.index_add(0, place, r.square())
        means = squares / zeros.index_add(0, place, torch.ones_like(r)).clamp_min(1)
        return place, torch.cat([zeros[:1], means.cumsum(0)])


class Reweighing:
    """Several reweighings as one, ω their product; their states are given and returned, and nothing is kept."""

    def __init__(self, given: Reweigh | Sequence[Reweigh] | None) -> None:
        self.parts = () if given is None else tuple(given) if isinstance(given, Sequence) else (given,)
        for each in self.parts:
            if isinstance(each, type) or not callable(each):
                raise TypeError(
                    f"reweigh has {each!r}; give ResidualAttention(), GroupBalance(), CausalWeights(times), a function "
                    "(residuals, state) -> (weights, state), or a tuple of these"
                )

    def __call__(self, residuals: Groups, states: Sequence[State]) -> tuple[dict[str, Tensor], list[State]]:
        """Returns ω of each group, [B_g], and the states that follow.

        Raises ValueError for weights of no group, of a wrong shape, negative or not finite.
        """
        weights = {name: torch.ones_like(r) for name, r in residuals.items()}
        following = []
        for place, each in enumerate(self.parts):
            found, state = _answer(each, residuals, states[place] if place < len(states) else {})
            following.append(state)
            for name, weight in found.items():
                checked = _checked(name, weight, residuals)
                weights[name] = weights[name] * checked
        return weights, following


def _answer(reweigh: Reweigh, residuals: Groups, state: State) -> tuple[Weights, State]:
    answer: Any = reweigh(residuals, state)
    if not (isinstance(answer, tuple) and len(answer) == 2 and all(isinstance(each, Mapping) for each in answer)):
        raise TypeError(
            f"reweigh returned {type(answer).__name__}; it must return two dicts, weights by group and the state for "
            "the next step, which may be {}"
        )
    return answer


def _checked(name: str, weight: Any, residuals: Groups) -> Tensor:
    if name not in residuals:
        raise ValueError(f"reweigh has weights for {name!r}; the closure's groups are {list(residuals)}")
    r = residuals[name]
    weight = torch.as_tensor(weight, dtype=r.dtype, device=r.device).detach()
    if weight.dim() and weight.shape != r.shape:
        raise ValueError(f"reweigh has weights of shape {list(weight.shape)} for the group {name!r} of {len(r)}")
    if not bool((weight.isfinite() & (weight >= 0)).all()):
        raise ValueError(f"reweigh has weights for the group {name!r} that are negative or not finite")
    return weight


def _part(of: Any, name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{type(of).__name__} {name}={value!r}; it must be in [0, 1)")


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above/below, as large as numbers are where below is 0; 1 for 0/0."""
    largest = torch.finfo(below.dtype).max ** 0.5
    return torch.where(above == below, torch.ones_like(below), (above / below).clamp(max=largest))
