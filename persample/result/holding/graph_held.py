"""The result of `persample.per_sample(hold="graph")`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from persample.backends.outputs import HeldGraph
from persample.capture.types import Capture, Captured
from persample.graph.saved import saved_by
from persample.result.gradient import Gradient
from persample.result.gradients import T
from persample.result.holding.unchanged import Unchanged, addresses, lies_in, require
from persample.result.per_sample_grads import PerSampleGrads


class GraphPerSampleGrads(PerSampleGrads):
    """Per-sample gradients of which nothing is held but the autograd graph: every reduction is a backward pass.

    Each parameter's factors are consumed when the pass has formed them, so the peak is that of the plain backward
    pass. `blocks`, and being the `other` of a Gram matrix, need all factors at once.
    """

    def __init__(
        self,
        graph: HeldGraph,
        parameters: Mapping[str, Tensor],
        backend: str,
        caller: frozenset[int] = frozenset(),
    ) -> None:
        reading = graph.reading
        super().__init__(Capture(reading.losses.detach(), {}, reading.notes), parameters, backend)
        self._graph = graph
        data = caller - addresses(parameters.values())
        saved = [each for each in saved_by(reading.nodes) if lies_in(each, data)]
        self._read_again = Unchanged(parameters.values()), Unchanged(saved)

    def __getstate__(self) -> Any:
        raise TypeError(
            "per-sample gradients with hold='graph' cannot be copied, pickled or saved: what they hold is autograd's "
            "graph. Capture the batch with hold='factors', or keep what the reductions return"
        )

    def __repr__(self) -> str:
        return f"PerSampleGrads(batch={self.batch}, parameters={len(self._parameters)}, graph held)"

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of trainable parameters that no loss depends on; their gradients are zero."""
        return tuple(name for name in self._parameters if not self._graph.reading.uses.get(name))

    def _each(self, form: Callable[[str, Gradient], T]) -> dict[str, T]:
        require(*self._read_again, way="hold='graph'")
        formed: dict[str, T] = {}

        def take(name: str, uses: tuple[Captured, ...]) -> None:
            formed[name] = form(name, Gradient(self._parameters[name], uses, self.losses))

        self._graph.stream(take)
        return {name: formed[name] for name in self._parameters}

    def _held(self) -> Mapping[str, Gradient]:
        return self._each(lambda _, gradient: gradient)
