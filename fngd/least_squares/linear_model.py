"""The least-squares problem at one point: residuals, their Jacobian and the system that gives directions.

m(v) = ½‖s − J v‖², v the change that is subtracted from the parameters      the linear model of the loss
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from fngd.least_squares.jacobian import FORMS, HELD_BYTES, Jacobian
from fngd.least_squares.residuals import Residuals
from fngd.least_squares.systems import SOLVES, SketchOptions, Solved, choose, form

CHECK_EVERY = 16
"""Of the steps, one in this many verifies that the rows of J add up."""


@dataclass(frozen=True)
class FormOptions:
    """What is formed of J, and the matrix that is solved with; see `fngd.GaussNewton`."""

    gram: str = "auto"
    chunk_size: int | None = None
    solve: str = "auto"
    max_samples: int = 8192
    sketch: SketchOptions = field(default_factory=SketchOptions)
    check: bool = True

    def __post_init__(self) -> None:
        for name, value, allowed in (("gram", self.gram, FORMS), ("solve", self.solve, SOLVES)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {list(allowed)}")
        if self.gram == "factored" and self.solve not in ("auto", "samples"):
            raise ValueError(f"gram='factored' forms J Jᵀ, not what solve={self.solve!r} needs; leave one of them out")
        for name, number in (("chunk_size", self.chunk_size), ("max_samples", self.max_samples)):
            if number is not None and not (isinstance(number, int) and number >= 1):
                raise ValueError(f"{name}={number!r}; it must be an integer ≥ 1")


class LinearModel:
    """J at one point and the system formed of it, for any number of dampings.

    Arguments:
        residuals: with their graph.
        params: those that a step changes.
        again: computes the same residuals once more, for the factored form.
        options: what is formed.
        step: the number of the step; seeds the sketch, and tells when to check.

    Raises:
        ValueError: no residual depends on a parameter; derivatives that are not finite.
    """

    def __init__(
        self,
        residuals: Residuals,
        params: Sequence[Tensor],
        again: Callable[[], Residuals],
        options: FormOptions,
        *,
        step: int = 0,
    ) -> None:
        if not residuals.scaled.requires_grad:
            raise ValueError(
                "no residual depends on a parameter: they have no graph. Do not use torch.no_grad() or detach() in the "
                "closure, and compute the residuals with this model"
            )
        batch, size = residuals.count, sum(p.numel() for p in params)
        factored = options.gram == "factored"
        kind = choose("samples" if factored else options.solve, batch, size, options.max_samples)
        chunk, fitting = options.chunk_size, max(1, HELD_BYTES // (8 * size))
        if options.gram == "auto" and chunk is None and batch > fitting:
            chunk = max(1, fitting // 3)
        check = options.check and step % CHECK_EVERY == 0
        self.loss = residuals.loss()
        self.jacobian = Jacobian(residuals, params, again, chunk=chunk, factored=factored, check=check)
        self.system = form(kind, self.jacobian, options.sketch, step)

    @property
    def trace(self) -> float:
        """tr J Jᵀ; of a sketch, its own, which is less."""
        return self.system.trace

    @property
    def rounding(self) -> float:
        """What rounding of the parameters does to s, about: changes of a norm below it cannot be told from none."""
        largest = max((p.detach().abs().amax().item() for p in self.jacobian.params if p.numel()), default=0.0)
        eps = torch.finfo(self.jacobian.scaled.dtype).eps
        return eps * math.sqrt(self.trace) * (largest if math.isfinite(largest) else 1.0)

    @property
    def noise(self) -> float:
        """What rounding does to the loss, about, with a margin of ten."""
        eps = torch.finfo(torch.float64).eps
        return 10 * (self.rounding * (self.rounding + math.sqrt(2 * self.loss)) + eps * self.loss)

    def solve(self, damping: float, start: Float[Tensor, " size"] | None = None) -> Solved:
        """argmin ‖J d − s‖² + λ‖d − start‖²."""
        rhs = self.jacobian.scaled.detach()
        if start is None:
            return self.system.solve(rhs, damping)
        solved = self.system.solve(rhs - self.jacobian.apply(start), damping)
        return Solved(start + solved.direction, solved.method, solved.error, solved.iterations)

    def decrease(self, image: Float[Tensor, " batch"]) -> float:
        """L − m(v), predicted for a change v, from its image J v."""
        left = self.jacobian.scaled.detach() - image
        return self.loss - left.double().square().sum().item() / 2
