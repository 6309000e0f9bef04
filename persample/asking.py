"""Asking the policy of `persample.reweight`, in the backward pass: from uses of layers to their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from persample.layers import LayerGrads, layer_grads
from persample.taps import Pass, Uses

Policy = Callable[..., Any]
"""(layer path, LayerGrads) → factors [B], a pair of gradients or None; jointly, one dict by path → another."""


class Asker:
    """Knows the policy, and while that runs, what it is asked about."""

    def __init__(self, policy: Policy, joint: bool) -> None:
        self._policy, self.joint = policy, joint
        self._asked: tuple[Pass, dict[str, tuple]] | None = None

    def gradients(self, group: list[Uses], needed: Sequence[bool]) -> list[Tensor | None]:
        """Returns the gradients of [weight, bias] of each layer of the group, after asking the policy."""
        result: list[Tensor | None] = [None] * (2 * len(group))
        met = []
        for number, uses in enumerate(group):
            layer, own = uses.layer, slice(2 * number, 2 * number + 2)
            if uses.found and layer.shared is not None:  # found out after some of its calls
                result[own] = layer.plain(uses, needed[own])
            elif uses.found:
                met.append((number, layer, layer.check(uses)))
        parts = {
            layer.path: (layer.module, found, needed[2 * number : 2 * number + 2], layer.axis)
            for number, layer, found in met
        }
        if not parts:
            return result
        grads = {path: layer_grads(*part) for path, part in parts.items()}
        self._asked = group[0].forward, parts
        try:
            answers = self._policy(grads) if self.joint else {path: self._policy(path, grads[path]) for path in grads}
        finally:
            self._asked = None
        for number, layer, _ in met:
            result[2 * number : 2 * number + 2] = layer.combine(grads[layer.path], answers.get(layer.path))
        return result

    @property
    def output_grad(self) -> Tensor | None:
        """The gradient at the output of the model, if it was kept."""
        return None if self._asked is None else self._asked[0].output_grad

    def joined(self, gather: Callable[[Tensor, int], Tensor]) -> dict[str, LayerGrads]:
        """Returns what the policy is asked about on a larger batch: see `Reweighting.joined`."""
        if self._asked is None:
            raise ValueError("joined(gather) is for policies; no backward pass is asking one now")
        return {
            path: layer_grads(module, [(gather(x, axis), gather(z, axis)) for x, z in found], needed, axis)
            for path, (module, found, needed, axis) in self._asked[1].items()
        }
