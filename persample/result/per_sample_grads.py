"""The result of `persample.per_sample`: quantities formed from blocks when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from jaxtyping import Inexact
from torch import Tensor

from persample import memory
from persample.blocks.types import Block
from persample.capture.types import Capture
from persample.result.arguments import check_buffers
from persample.result.explanation import Explanation, explained
from persample.result.gradient import Gradient, reused
from persample.result.gradients import T, reduction
from persample.result.holding.factors import held, owned, portable, watched
from persample.result.quantities import Quantities


class PerSampleGrads(Quantities):
    """Per-sample gradients of one batch, held as factors; every method forms what it returns when called.

    With θ the parameters, ℓ_b the loss of sample b and g_b = ∂ℓ_b/∂θ. Results have the precision of the
    parameters, float32 where those are half precision, and carry no graph.

    >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> psg = persample.per_sample(nn.Linear(2, 1, bias=False), lambda y, _: y.sum(1), x)
    >>> psg.losses.shape, psg.batch, psg.backend
    (torch.Size([2]), 2, 'outputs')
    """

    def __init__(
        self,
        capture: Capture,
        parameters: Mapping[str, Tensor],
        backend: str,
        caller: frozenset[int] = frozenset(),
    ) -> None:
        """`caller`: the `persample.result.holding.unchanged.addresses` of tensors that others may write to."""
        self.losses = capture.losses
        self.backend = backend
        self.notes = capture.notes
        self._parameters = dict(parameters)
        self._apart = {}
        uses = owned(capture.uses, caller)
        self._gradients = {
            name: Gradient(parameter, uses.get(name, ()), capture.losses) for name, parameter in parameters.items()
        }
        self._unchanged = watched(self._gradients.values(), caller)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied, pickled and saved: the factors, and of the parameters their shapes."""
        self._require()
        gradients = portable(self._gradients)
        parameters = {name: gradient.parameter for name, gradient in gradients.items()}
        return {**vars(self), "_gradients": gradients, "_parameters": parameters, "_unchanged": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _copied=True)
        self._unchanged = watched(self._gradients.values(), frozenset())

    def __repr__(self) -> str:
        held = sum(block.nbytes for blocks in self.blocks.values() for block in blocks)
        return (
            f"PerSampleGrads(batch={self.batch}, parameters={len(self._parameters)}, backend={self.backend!r}, "
            f"factors={held / 2**20:.1f} MiB)"
        )

    @property
    def blocks(self) -> dict[str, tuple[Block, ...]]:
        """The factors: name -> one block for each use of the parameter, whose rows add up to g_b.

        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> psg = persample.per_sample(nn.Linear(2, 1, bias=False), lambda y, _: y.sum(1), x)
        >>> [type(block).__name__ for block in psg.blocks["weight"]]
        ['Outer']
        """
        return {name: gradient.blocks for name, gradient in self._held().items()}

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of trainable parameters that no loss depends on; their gradients are zero.

        >>> model = nn.ModuleDict({"used": nn.Linear(2, 1, bias=False), "spare": nn.Linear(2, 1, bias=False)})
        >>> model.forward = lambda x: model["used"](x)
        >>> persample.per_sample(model, lambda y, _: y.sum(1), torch.randn(5, 2)).unused
        ('spare.weight',)
        """
        return tuple(name for name, gradient in self._gradients.items() if not gradient.uses)

    def grads(self, *, out: Mapping[str, Tensor] | None = None) -> dict[str, Inexact[Tensor, "batch *shape"]]:
        """Returns g_b for every parameter: name -> [B, *shape].

        Args:
            out: buffers to write into, name -> contiguous [B, *shape] in the result's dtype, for some or all
                parameters: the result of an earlier call, for example. Without, large results are written where
                earlier ones were that nothing refers to any more, or to fresh memory (`persample.memory`).

        Raises:
            ValueError: a buffer of another shape, dtype or device.

        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> psg = persample.per_sample(nn.Linear(2, 1, bias=False), lambda y, _: y.sum(1), x)
        >>> psg.grads()["weight"]
        tensor([[[3., 4.]],
                [[0., 1.]]])
        """
        largest = max((parameter.nbytes for parameter in self._parameters.values()), default=0)
        if 2 * self.batch * largest < memory.SMALLEST:  # twice, because rows of half precision are float32
            return self._rows(out or {})
        return self._rows(out or {}, reused)

    def explain(self) -> list[Explanation]:
        """Returns, for every use of every parameter, operation, rule, block, algorithm and bytes held.

        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> psg = persample.per_sample(nn.Linear(2, 1, bias=False), lambda y, _: y.sum(1), x)
        >>> for use in psg.explain():
        ...     print(use.parameter, use.operation, use.block)
        weight Mm Outer
        """
        return [row for rows in self._each(explained).values() for row in rows]

    @reduction
    def _rows(
        self, out: Mapping[str, Tensor], elsewhere: Callable[[Gradient], Tensor | None] | None = None
    ) -> dict[str, Tensor]:
        """`grads`; where `out` has no buffer, in the memory that `elsewhere` finds, which by default is fresh."""
        check_buffers(out, self._parameters, self.batch)
        if elsewhere is None:
            return self._each(lambda name, gradient: gradient.materialise(out.get(name)))
        return self._each(
            lambda name, gradient: gradient.materialise(out[name] if name in out else elsewhere(gradient))
        )

    # --- what depends on how the gradients are held ---------------------------------------------------------

    def _each(self, form: Callable[[str, Gradient], T]) -> dict[str, T]:
        """`form` of every parameter's gradient, by name."""
        return {name: form(name, gradient) for name, gradient in self._held().items()}

    def _held(self) -> Mapping[str, Gradient]:
        """Every parameter's gradient, all at once."""
        return self._gradients

    def _condense(self) -> None:
        """Holds rows in place of larger factors, for a reduction that forms the rows and for those to come."""
        before, self._gradients = self._gradients, {name: each.condensed() for name, each in self._gradients.items()}
        changed = [name for name, each in before.items() if self._gradients[name] is not each]
        if changed:
            self._condensed |= {*changed}
            self._unchanged.forget([*chain(*held(self._gradients.values()))])

    def _require(self) -> None:
        """Raises `RuntimeError` unless factors are as they were captured."""
        if not self._unchanged.still():
            raise RuntimeError(
                "a tensor that these per-sample gradients are formed from was modified in place after they were "
                "captured (the input batch itself, perhaps); form what you need before, or pass a copy"
            )
