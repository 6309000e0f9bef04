"""Layers that are functions: whose weight it is that a function of torch is given (see
`persample.reweighting.functions.interception`).

A module is one layer, known beforehand. A function is known when it is called, by what it is called with: the
parameters that own its weight and bias. A weight with several biases is several layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import count

from torch import Tensor, nn

from persample.reweighting.batch_axis.folded import Folded
from persample.reweighting.functions.interception import Function, Watcher, base_of
from persample.reweighting.functions.linear_calls import Call
from persample.reweighting.layer import Layer
from persample.reweighting.slices import part_of, parts_of


class FunctionLayers:
    """Watches weights while forward passes run, and finds the layers of the functions that use them.

    Arguments:
        weights: parameters that functions may use → their names.
        function: what is called in place of a linear function with a watched weight.
        layers: by path, those of modules; functions are added as they are met.
        axis_of: path → the batch axis, or how rows are folded, that the user gave.
    """

    def __init__(
        self,
        weights: dict[nn.Parameter, str],
        function: Function,
        layers: dict[str, Layer],
        axis_of: Callable[[str], int | Folded | None],
    ) -> None:
        self.watcher = Watcher(weights, function)
        self.watched = list(weights)
        """What is watched for the whole of the model's forward."""
        self._layers, self._axis_of = layers, axis_of
        self._kinds: dict[str, tuple[nn.Module | None, int]] = {}
        """Of functions, by path: the geometry of a convolution, and along which axis of the parameter its rows are."""
        self._entered: list[list[nn.Parameter]] = []

    def enter(self, weights: list[nn.Parameter]) -> None:
        """A forward begins that may use these weights; to be followed by `leave`."""
        self._entered.append(self.watcher.start(weights))

    def leave(self) -> None:
        """It ends."""
        if self._entered:
            self.watcher.stop(self._entered.pop())

    def leave_all(self) -> None:
        """No forward runs."""
        while self._entered:
            self.leave()

    def watching(self) -> AbstractContextManager[None]:
        """Within the context what is watched for the model's forward is watched."""
        return self.watcher.watching(self.watched)

    def forget_called(self) -> None:
        """From now on weights are not watched that modules use, and no function."""
        called = {id(weight) for layer in self._layers.values() if layer.called for weight in layer.members()}
        given = {id(weight) for layer in self._layers.values() if layer.module is None for weight in layer.owners}
        self.watched = [each for each in self.watched if id(each) not in called or id(each) in given]

    def layer(self, name: str, call: Call, used: Callable[[Layer], bool]) -> Layer:
        """Returns the layer of a function's weight and bias; `used`: whether the pass that runs has met a layer."""
        weight, bias = call.weight, call.bias
        owners = tuple(base_of(each) for each in (weight, bias) if each is not None)
        part = part_of(weight, owners[0])
        kind = call.geometry, 0 if part is None else part.axis  # a matrix and its transpose are two layers
        for number in count(1):
            path = name if number == 1 else f"{name} ({number})"
            layer = self._layers.get(path)
            if layer is None:
                layer = Layer(path=path, module=None, where=self._axis_of(name), owners=owners, geometry=call.geometry)
                self._layers[path], self._kinds[path] = layer, kind
                layer.source = lambda: (weight, bias)
            if layer.module is None and self._kinds[path] == kind and _owned(layer, owners, used):
                layer.owners = owners
                return layer
        raise AssertionError("count never ends")


def computed(owners: tuple[Tensor, ...]) -> bool:
    """Whether a bias among them is no parameter."""
    return any(not isinstance(each, nn.Parameter) for each in owners)


def renewed(layer: Layer) -> bool:
    """Whether a layer's weight and bias are there before it is called; a function's are then those of this pass.

    What it was given in an earlier pass may be rows of a parameter: views that have no graph (of a rehearsal), or that
    the optimiser's step has made useless.
    """
    if computed(layer.owners):  # this pass has yet to compute them
        return False
    if layer.module is None:
        weight, bias = parts_of(layer)
        if weight is None:
            return False
        own = weight.of(weight.param), None if bias is None else bias.of(bias.param)
        layer.source = lambda: own
    return True


def _owned(layer: Layer, owners: tuple[Tensor, ...], used: Callable[[Layer], bool]) -> bool:
    """Whether they are a function's layer's; a bias that is computed is another tensor in each pass."""
    if [id(each) for each in layer.owners] == [id(each) for each in owners]:
        return True
    if layer.owners[0] is not owners[0] or not (computed(layer.owners) and computed(owners)):
        return False
    return not used(layer)
