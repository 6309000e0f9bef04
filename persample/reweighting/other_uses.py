"""Weights that a model uses besides calling their layers: `reweight` reweights the calls, and nothing else.

A tied autoencoder calls `self.enc(x)`, and `F.linear(h, self.enc.weight.t())` after it, which counts as a call with
functions=True alone. All that the calls contribute to the gradient goes through a Tap
(`persample.reweighting.autograd`), so whoever walks back from the model's output and passes the Taps by on their other
side meets such a weight only where something else uses it. One walk, in the first batch:

    weight ──▶ Tap ◀── output of the layer     not followed: Tap ▶ weight
      │                                        followed: everything else
      └──▶ transposed ──▶ …                    met: the weight, coming from "transposed"
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from persample.graph.nodes import Node
from persample.graph.provenance import tensors_of
from persample.reweighting.autograd import Tap
from persample.reweighting.layer import Layer


def note_uses_besides(layers: Iterable[Layer], inputs: Any, output: Any) -> list[Layer]:
    """Returns the layers whose weight or bias something else uses, and notes in them what it is.

    Arguments:
        layers: of which some have been called in the forward pass that has just ended.
        inputs, output: of the model; what is behind the inputs is not looked at.
    """
    layers = list(layers)
    users = _users(inputs, output)
    # Some rows of a parameter may be one layer, and others, which work on what all samples share, another.
    plain = {id(each) for layer in layers if layer.why_plain() is not None for each in layer.members()}
    found = []
    for layer in layers:
        own = {id(each) for each in layer.members()} - plain
        names = sorted({name for parameter, name in users if id(parameter) in own})
        if layer.called and names and layer.why_plain() is None:
            layer.besides = ", ".join(names)
            found.append(layer)
    return found


def _users(inputs: Any, output: Any) -> list[tuple[Tensor, str]]:
    """Parameters behind the output, each with the name of a node that uses it and is no Tap."""
    seen = {each.grad_fn for each in tensors_of(inputs)}
    ends: list[Node] = [each.grad_fn for each in tensors_of(output) if each.grad_fn is not None]
    tap, leaf = cast(Any, Tap), cast(Any, torch._C._functions).AccumulateGrad
    users = []
    while ends:
        node = ends.pop()
        if node in seen:
            continue
        seen.add(node)
        edges = node.next_functions[:1] if isinstance(node, tap._backward_cls) else node.next_functions
        for following, _ in edges:
            if isinstance(following, leaf):
                users.append((following.variable, node.name()))
            elif following is not None:
                ends.append(following)
    return users


class SharedWeightWarning:
    """Stands for a policy, and for what is known before it is asked, until one of these layers is reweighted.

    Then it warns, once. A layer that keeps the plain gradient (the policy returns None) keeps it in all of its uses.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        # An embedding is a layer that is never reweighted, as everyone knows who ties it: `explain` alone says it.
        self._besides = {
            layer.path: layer.besides
            for layer in layers
            if not all(name.startswith("Embedding") for name in layer.besides.split(", "))
        }

    def policy(self, policy: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the policy, watched; it may be one that is asked about all layers at once."""

        def asked(*args: Any) -> Any:
            answer = policy(*args)
            self._tell(answer if len(args) == 1 else {args[0]: answer})
            return answer

        return asked

    def known(self, known: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the same of `known`."""

        def asked(path: str, *args: Any) -> Any:
            answer = known(path, *args)
            self._tell({path: answer})
            return answer

        return asked

    def _tell(self, answers: Any) -> None:
        told = {path: name for path, name in self._besides.items() if answers.get(path) is not None}
        for path, name in told.items():
            del self._besides[path]
            warnings.warn(
                f"the weight of layer '{path}' is used besides calling the layer (by {name} in the graph): what its "
                "calls contribute to the gradient is reweighted, what the other use contributes stays as it is, and "
                "the two are added. Call the layer in both places, or untie them with a weight for each; with "
                "functions=True F.linear(x, weight.t()) and x @ weight are recognised. Or leave the layer out: "
                "a policy that returns None for it, in fngd a parameter group with precondition=False.",
                UserWarning,
                stacklevel=2,
            )
