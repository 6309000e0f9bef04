"""The result of `persample.per_sample(hold="graph")`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from persample.backends import Capture, Captured
from persample.backends.outputs import HeldGraph
from persample.gradient import Gradient
from persample.result import PerSampleGrads, T
from persample.unchanged import Unchanged


class GraphPerSampleGrads(PerSampleGrads):
    """Per-sample gradients of which nothing is held but the autograd graph: every reduction is a backward pass.

    Each parameter's factors are consumed when the pass has formed them, so the peak is that of the plain backward
    pass. `blocks`, and being the `other` of a Gram matrix, need all factors at once.
    """

    def __init__(self, graph: HeldGraph, parameters: Mapping[str, Tensor], backend: str) -> None:
        reading = graph.reading
        super().__init__(Capture(reading.losses.detach(), {}, reading.notes), parameters, backend)
        self._graph = graph
        self._unchanged = Unchanged(parameters.values())

    def __repr__(self) -> str:
        return f"PerSampleGrads(batch={self.batch}, parameters={len(self._parameters)}, graph held)"

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of trainable parameters that no loss depends on; their gradients are zero."""
        return tuple(name for name in self._parameters if not self._graph.reading.uses.get(name))

    def _each(self, form: Callable[[str, Gradient], T]) -> dict[str, T]:
        self._unchanged.require("hold='graph'")
        formed: dict[str, T] = {}

        def take(name: str, uses: tuple[Captured, ...]) -> None:
            formed[name] = form(name, Gradient(self._parameters[name], uses, self.losses))

        self._graph.stream(take)
        return {name: formed[name] for name in self._parameters}

    def _held(self) -> Mapping[str, Gradient]:
        return self._each(lambda _, gradient: gradient)
