"""Which layers KFAC, SKFAC and Eva precondition, in which parameter group each is, and why others are left alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fngd.kronecker.layers.shared_weights import NO_FACTORS, conflicts, is_transposed, never_preconditioned
from fngd.optim.distributed import Exchange
from fngd.optim.layers import Part, attention_parameters, members, unseen
from persample import LayerGrads
from persample.reweighting import Reweighting

Groups = list[dict[str, Any]]


class Chosen:
    """The layers of a model: modules, known from the beginning, and functions, known when they have been called.

    Arguments:
        functions: whether functions are to be preconditioned.
    """

    handle: Reweighting

    def __init__(self, model: nn.Module, *, functions: bool) -> None:
        self._model, self.functions = model, functions
        self._plain = never_preconditioned(model)
        self.modules: dict[str, nn.Module] = {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
            and path not in self._plain
            and module._parameters.get("weight") is not None
        }
        self._functions: set[str] = set()
        self._agreed: Sequence[str] | None = None  # functions that every process has met; None: not asked yet
        self._met: set[str] = set()
        self._changed = False

    def parameters(self) -> set[Tensor]:
        """Returns the parameters that are known to belong to layers."""
        found = set(attention_parameters(self._model)) if self.functions else set()
        for module in self.modules.values():
            found.update(param for param in module._parameters.values() if param is not None)
        return found

    def find_groups(self, groups: Groups) -> None:
        """Notes each parameter's group by its number: loading a state makes new groups, and FSDP swaps parameters."""
        self._group_of = {param: number for number, group in enumerate(groups) for param in group["params"]}
        self._numbers = {
            layer: (self._number(module._parameters.get("weight")), self._number(module._parameters.get("bias")))
            for layer, module in self.modules.items()
        }

    def _number(self, param: Tensor | None) -> int | None:
        return None if param is None else self._group_of.get(param)

    def members(self, layer: str, groups: Groups) -> tuple[dict[str, Any], Part, Part | None] | None:
        """(group of the weight, weight, bias) where they are preconditioned; bias None where it is not, or is none."""
        plain = layer in self._plain or self._unknown_elsewhere(layer)
        weight, bias = (None, None) if plain else members(self.handle, layer)
        if weight is None:
            return None
        if layer not in self._numbers:  # a function
            self._numbers[layer] = self._number(weight.param), None if bias is None else self._number(bias.param)
        own, others = (None if number is None else groups[number] for number in self._numbers[layer])
        if own is None or not own["precondition"]:
            return None
        if bias is not None and not (bias.param.requires_grad and others is not None and others["precondition"]):
            bias = None
        return own, weight, bias

    def meet(self, layer: str) -> None:
        """Notes that a backward pass has met a layer."""
        if layer not in self._met:
            self._met.add(layer)
            self._changed = True

    def has_factors(self, layer: str, grads: LayerGrads) -> bool:
        """Whether Kronecker factors are kept for it; of a function its gradients tell."""
        if layer not in self.modules and is_transposed(grads):
            self._plain[layer] = NO_FACTORS
        return layer not in self._plain

    def look(self) -> None:
        """Notes what the layers met are, and which of them share parameters."""
        if not self._changed:
            return
        self._changed = False
        self._functions = set(self.handle.functions) & set(self.handle.layers)
        if self._functions:
            used = {path: members(self.handle, path) for path in sorted(self._met)}
            self._plain |= conflicts(self._model, used, self._functions)
        for path, users in self.handle.besides().items():
            self._plain.setdefault(path, f"its weight is used besides calling it, by {users}")

    def agree(self, exchange: Exchange) -> tuple[str, ...]:
        """Returns the layers that every process can precondition, in the same order in each of them.

        A process that has not met a function knows nothing of its weight. So in their first step, and in the first
        one after loading a state, the processes tell each other which they have met: those of all count.
        """
        if self._agreed is None:
            self._agreed = sorted(exchange.common(self._functions))
        return (*self.modules, *(path for path in self._agreed if path not in self.modules))

    def forget_agreement(self) -> None:
        """A state was loaded."""
        self._agreed = None

    def _unknown_elsewhere(self, layer: str) -> bool:
        return self._agreed is not None and layer in self._functions and layer not in self._agreed

    def explain(self, groups: Groups) -> dict[str, str]:
        """Returns for each layer whether it is preconditioned, and why not."""
        self.look()
        result = {}
        for path, reason in self.handle.explain().items():
            if path in self._plain:
                reason = f"plain: {self._plain[path]}"
            elif self._unknown_elsewhere(path):
                reason = "plain: not every process had used it when they agreed on functions, in their first step"
            elif reason.startswith("reweighted") and members(self.handle, path)[0] is None:
                reason = "plain: its bias is no parameter, nor rows of one"
            elif reason.startswith("reweighted") and self.members(path, groups) is None:
                reason = "plain: its weight is in no group with precondition=True"
            if reason.startswith("reweighted"):
                reason = "preconditioned" + reason.removeprefix("reweighted")
            result[path] = reason
        return result | unseen(self._model, list(result), functions=self.functions)
