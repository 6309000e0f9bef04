"""Optimisers that would be plain SGD without a word: how much of a model is preconditioned, told at the first step.

Counted are matrices, kernels and tables (parameters of two axes or more) by their entries, of those that have got a
gradient and that are to be preconditioned. What the user has left out (precondition=False, frozen, in no group, another
rule) does not count.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fngd.optim.layers import Part, members
from persample import Reweighting

CHOSEN = "functions=False"
"""The reason that a user has chosen."""
MOVED = "other= has taken it before the function that uses it was known: give parameter groups"
NAMED = 3
"""Parameters that the warning names."""

Preconditioned = Callable[[], tuple[list[Part], Callable[[Tensor], str]]]
"""→ (what is preconditioned, a parameter → why it is not)."""


class Coverage:
    """Tells once of parameters that are not preconditioned: of those an optimiser began with, and of those added.

    Arguments:
        method: the optimiser's name.
        model: for names; None where the optimiser knows none.
    """

    def __init__(self, method: str, model: nn.Module | None = None) -> None:
        self._method, self._model = method, model
        self._new: list[Tensor] = []
        self._moved: list[Tensor] = []

    def begin(self, groups: Sequence[Mapping[str, Any]], other: str = "sgd") -> None:
        """Begins with these parameter groups. Tells at once where neither they nor the model have a matrix.

        `other`: the rule to which parameters were moved that were in no layer, as far as that was known.
        """
        self.add(groups)
        moved = (group for group in groups if other != "sgd" and group["rule"] == other and not group["precondition"])
        self._moved = [param for group in moved for param in group["params"] if param.dim() > 1]
        given = [param for group in groups for param in group["params"]]
        there = given if self._model is None else [*given, *self._model.parameters()]
        left = [param for param in _wanted(groups) if param.requires_grad]
        if left and all(param.dim() < 2 for param in there):
            self._warn({}, dict.fromkeys(left, "it is no matrix"))

    def add(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Adds parameter groups, of which the next step tells."""
        self._new += [param for param in _wanted(groups) if param.dim() > 1]

    def look(self, found: Preconditioned) -> None:
        """Tells, where gradients are there for the first time, if less than half of the matrices is preconditioned."""
        if not self._new and not self._moved:
            return
        new, moved = ([param for param in each if param.grad is not None] for each in (self._new, self._moved))
        if not new and not moved:
            return
        self._new, self._moved = [], []
        parts, why = found()
        reasons = {param: why(param) for param in moved}
        taken = {param: MOVED for param, each in reasons.items() if each.startswith("its weight is in")}
        entries = {param: _entries(param, parts) for param in (*new, *taken)}
        if not entries:
            return
        left = {param: why(param) for param, number in entries.items() if not number} | taken
        if any(entries.values()):
            entries = {param: number for param, number in entries.items() if left.get(param) != CHOSEN}
        if 2 * sum(entries.values()) < sum(param.numel() for param in entries) or not any(entries.values()):
            self._warn(entries, left)

    def _name(self, param: Tensor) -> str:
        named = () if self._model is None else self._model.named_parameters()
        return next((name for name, each in named if each is param), "")

    def _warn(self, counted: Mapping[Tensor, int], left: Mapping[Tensor, str]) -> None:
        """`counted`: entries of matrices that are preconditioned; `left`: why parameters are not."""
        total, entries = sum(param.numel() for param in counted), sum(counted.values())
        largest = sorted(left, key=Tensor.numel, reverse=True)[:NAMED]
        named = [f"{self._name(param) or 'one'} {list(param.shape)} ({left[param]})" for param in largest]
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        much = f"{100 * entries / max(total, 1):.0f} % of the entries of their matrices" if entries else "nothing"
        layers = (
            "" if self._model is None else " Layers are nn.Linear, convolutions and products of data with a parameter, "
            "within the model that the optimiser was given."
        )  # fmt: skip
        warnings.warn(
            f"{self._method} preconditions {much}; the rest of the parameters that it was given takes the plain "
            f"gradient: {', '.join(named)}{more}.{layers} If that is what you want, put the rest into a parameter "
            "group with precondition=False, which ends this warning",
            UserWarning,
            stacklevel=4,
        )


def _wanted(groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    return [param for group in groups if group["precondition"] for param in group["params"]]


def _entries(param: Tensor, parts: Sequence[Part]) -> int:
    """How many entries of a parameter are in one of the parts."""
    own = {(part.axis, part.start, part.stop) for part in parts if part.param is param}
    sizes = ((stop - start) * param.numel() // max(param.shape[axis], 1) for axis, start, stop in own)
    return min(param.numel(), sum(sizes))


def told(
    model: nn.Module, handle: Reweighting, why: Mapping[str, str], *, functions: bool
) -> tuple[list[Part], Callable[[Tensor], str]]:
    """Returns what `Coverage.look` asks for, of an optimiser that explains its layers."""
    paths = [path for path, each in why.items() if not each.startswith("plain")]
    parts = [part for path in paths for part in members(handle, path) if part is not None]
    return parts, lambda param: reason(model, why, param, functions=functions)


def reason(model: nn.Module, explained: Mapping[str, str], param: Tensor, *, functions: bool = True) -> str:
    """Returns why a parameter is not preconditioned, as far as what is explained of layers tells.

    >>> table = nn.Embedding(3, 2)
    >>> reason(table, {}, table.weight)
    "it is an embedding's table"
    """
    names = [name for name, each in model.named_parameters(remove_duplicate=False) if each is param]
    for name in names:
        path = name.rpartition(".")[0]
        computed, parametrised, _ = f".{path}".partition(".parametrizations")
        for each in [computed[1:]] if parametrised else [name, path]:
            if explained.get(each, "").startswith("plain"):
                return explained[each].partition(": ")[2]
    if not names:
        return "it is not in the model that the optimiser was given"
    module = model.get_submodule(names[0].rpartition(".")[0])
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "it is an embedding's table"
    return f"no layer is recognised in what {type(module).__name__} does with it" if functions else CHOSEN
