"""Asking the policy of `persample.reweight`, in the backward pass: from uses of layers to their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from persample.reweighting.autograd import Pass, Uses, upcoming
from persample.reweighting.batch_axis.uncertain import called_apart
from persample.reweighting.layer import Layer
from persample.reweighting.layer_grads import LayerGrads, UnreadGrads
from persample.reweighting.other_uses import SharedWeightWarning
from persample.reweighting.weighted_sum import Parameters

Part = tuple[Any, list[tuple[Tensor, Tensor]], Sequence[bool], Any]
"""The arguments of `LayerGrads`."""

Policy = Callable[..., Any]
"""(layer path, LayerGrads) → factors [B], a pair of gradients or None; jointly, one dict by path → another."""

Known = Callable[[str, int, torch.device], Tensor | None]
"""(layer path, batch size, device) → factors [B] that do not depend on the gradients, or None."""

Follow = Callable[[int | None], Callable[[], None]]
"""(batch size of a forward pass) → what to call when a backward pass reaches the model's output in it."""


class PolicyCaller:
    """Knows the policy, and while that runs, what it is asked about."""

    def __init__(self, policy: Policy, known: Known | None, joint: bool, follow: Follow | None = None) -> None:
        self._policy, self._known, self.joint, self.follow = policy, known, joint, follow
        self.paused = 0  # how many contexts are open in which nobody is asked
        self.followed: WeakSet[Uses] = WeakSet()
        """With `follow`: the uses of layers in every forward pass whose graph is there."""
        self._asked: tuple[Pass, dict[str, Part]] | None = None

    @contextmanager
    def wrapped(self, wrap: Callable[[Policy], Policy]) -> Iterator[None]:
        """See `Reweighting.wrapped`."""
        before = self._policy, self._known
        self._policy, self._known = wrap(self._policy), None
        try:
            yield
        finally:
            self._policy, self._known = before

    def tell_of(self, layers: list[Layer]) -> None:
        """From now on a warning is given when one of these, which are used besides their calls, is reweighted."""
        if layers:
            telling = SharedWeightWarning(layers)
            self._policy = telling.policy(self._policy)
            self._known = None if self._known is None else telling.known(self._known)

    def of_layer(self, uses: Uses, needed: Sequence[bool]) -> Parameters:
        """Returns the gradients of a layer's weight and bias, after asking the policy about it."""
        layer: Layer = uses.layer
        if layer.shared is not None or self.paused:  # found out after some of its calls; a graph from before
            return layer.plain(uses, needed)
        if uses.forward.question is not None:
            uses.forward.question()
        met, unread = uses.found, None
        try:
            if self.joint and uses.forward.apart:
                uses.found = []
                raise called_apart(layer.path)
            found, axis = layer.check(uses)
        except ValueError as error:
            unread = UnreadGrads(layer.operation, met, needed, error.with_traceback(None))
        if unread is not None:
            return self._answered(layer, uses, unread, {})
        if self._known is not None:
            z = found[0][1]
            factors = self._known(layer.path, z.shape[axis], z.device)
            if factors is not None:
                layer.check_factors(factors, z.shape[axis])
                return layer.sum(found, needed, axis, factors)
        part: Part = layer.operation, found, needed, axis
        return self._answered(layer, uses, LayerGrads(*part), {layer.path: part})

    def _answered(self, layer: Layer, uses: Uses, grads: LayerGrads, parts: dict[str, Part]) -> Parameters:
        self._asked, layer.left_out = (uses.forward, parts), False
        try:
            answer = (
                self._policy({layer.path: grads}).get(layer.path) if self.joint else self._policy(layer.path, grads)
            )
        finally:
            self._asked = None
        combined = layer.combine(grads, answer)
        layer.left_out = isinstance(grads, UnreadGrads)
        return combined

    def of_all(self, group: list[Uses], needed: Sequence[bool]) -> list[Tensor | None]:
        """Returns the gradients of [weight, bias] of each layer of the group, after asking the policy about all."""
        if group[0].forward.question is not None:
            group[0].forward.question()
        result: list[Tensor | None] = [None] * (2 * len(group))
        parts: dict[str, Part] = {}
        grads: dict[str, LayerGrads] = {}
        met = []
        for number, uses in enumerate(group):
            layer, own = uses.layer, slice(2 * number, 2 * number + 2)
            if uses.found and (layer.shared is not None or self.paused):
                result[own] = layer.plain(uses, needed[own])
            elif uses.found:
                met.append((own, layer))
                found = uses.found
                try:
                    read, axis = layer.check(uses)
                except ValueError as error:
                    grads[layer.path] = UnreadGrads(layer.operation, found, needed[own], error.with_traceback(None))
                else:
                    part: Part = layer.operation, read, needed[own], axis
                    parts[layer.path], grads[layer.path] = part, LayerGrads(*part)
        if not met:
            return result
        self._asked = group[0].forward, parts
        try:
            answers = self._policy(grads)
        finally:
            self._asked = None
        for own, layer in met:
            layer.left_out = False
            result[own] = layer.combine(grads[layer.path], answers.get(layer.path))
            layer.left_out = isinstance(grads[layer.path], UnreadGrads)
        return result

    def upcoming(self) -> list[str]:
        """Returns what `Reweighting.upcoming` does."""
        return sorted(uses.layer.path for uses in self.followed if upcoming(uses))

    @property
    def output_grad(self) -> Tensor | None:
        """The gradient at the output of the model, if it was kept."""
        return None if self._asked is None else self._asked[0].output_grad

    def joined(self, gather: Callable[[Tensor, int], Tensor]) -> dict[str, LayerGrads]:
        """Returns what the policy is asked about on a larger batch: see `Reweighting.joined`."""
        if self._asked is None:
            raise ValueError("joined(gather) is for policies; no backward pass is asking one now")
        return {
            path: LayerGrads(module, [(gather(x, axis), gather(z, axis)) for x, z in found], needed, axis)
            for path, (module, found, needed, axis) in self._asked[1].items()
        }
