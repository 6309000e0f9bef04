"""One direction of a Gauss–Newton step, tried: the loss along it, and what the linear model predicted.

Residuals that stay what they are while the parameters move were computed outside the closure. That is found here, where
the closure is called at other parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from fngd.least_squares.acceleration import acceleration
from fngd.least_squares.jacobian import flatten
from fngd.least_squares.line_search import Found, Ray, geometric_search
from fngd.least_squares.linear_model import LinearModel
from fngd.least_squares.repeated import RepeatedClosure, unchanged
from fngd.least_squares.residuals import Residuals

VISIBLE = 1e3
"""Changes of the residuals this many times larger than rounding cannot be hidden by it."""


class Attempt:
    """The path θ − t·v − t²·c at one damping.

    Arguments:
        calls: the closure.
        model: at θ.
        ray: the path; straight until `accelerate`.
        damping: with which v was solved for.
    """

    def __init__(self, calls: RepeatedClosure, model: LinearModel, ray: Ray, damping: float) -> None:
        self._calls, self._model, self._ray, self._damping = calls, model, ray, damping
        self.loss = model.loss
        self._change = flatten(ray.change, ray.params)
        self.finite = bool(self._change.isfinite().all())
        self.image: Float[Tensor, " batch"] = model.jacobian.apply(self._change) if self.finite else self._change[:0]
        """J v."""
        self.predicted = model.decrease(self.image) if self.finite else math.nan
        """Decrease of the loss by a full step, as the linear model has it; NaN where v is not finite."""

    @property
    def hidden(self) -> bool:
        """Whether rounding can hide all of the decrease that is predicted."""
        return self.predicted <= self._model.noise

    def accelerate(self, step: float, rates: list[float]) -> None:
        """Bends the path by geodesic acceleration, for a step of about this size; parameter by parameter its rate."""
        if not self.finite:
            return

        def solve(rhs: Tensor) -> Tensor:
            return self._model.system.solve(rhs, self._damping).direction

        def at(h: float) -> Tensor:
            try:
                return self._at(h).scaled.detach()
            finally:
                self._ray.go(0.0)  # the solve uses the graph of θ

        s = self._model.jacobian.scaled.detach()
        found = acceleration(solve, at, s, self.image, self._change, step)
        if found is not None:
            parts = found.split([p.numel() for p in self._ray.params])
            self._ray.curve = [
                part.view_as(p).to(p.dtype) * (rate / max(rates))
                for part, p, rate in zip(parts, self._ray.params, rates, strict=True)
            ]

    def search(self, start: float) -> Found:
        """The best t of 1, ½, ¼, …, from `start` on; the parameters are where they were."""
        return self._looked(lambda: geometric_search(self._loss, self.loss, start=start))

    def full(self) -> Found:
        """t = 1 where that lowers the loss, else 0."""

        def look() -> Found:
            reached = self._loss(1.0)
            return Found(1.0 if reached < self.loss else 0.0, min(reached, self.loss), 1)

        return self._looked(look)

    def gain(self, found: Found) -> float:
        """Actual over predicted decrease of the loss at the step found; −inf where none was, or none is predicted.

        The prediction is that of the straight line.
        """
        decrease = self._model.decrease(found.step * self.image) if found.step else 0.0
        return (self.loss - found.loss) / decrease if decrease > 0 else -math.inf

    def _looked(self, look: Callable[[], Found]) -> Found:
        if not self.finite:
            return Found(0.0, self.loss, 0)
        try:
            return look()
        finally:
            self._ray.go(0.0)

    def _loss(self, step: float) -> float:
        return self._at(step).loss()

    def _at(self, step: float) -> Residuals:
        self._ray.go(step)
        first, found = self._model.jacobian.residuals, self._calls.again()
        if self._calls.repeats <= 2 and found.count == first.count:
            self._changed_or_error(first, found, step)
        return found

    def _changed_or_error(self, first: Residuals, found: Residuals, step: float) -> None:
        name = unchanged(first, found, step * self.image, VISIBLE * self._model.rounding)
        if name is not None:
            raise ValueError(
                f"residual group {name!r} is the same at other parameters, though it depends on them: was the model "
                "called outside the closure? Call it within, opt.step(lambda: model(x) - y), so that the line search "
                "sees the residuals where it tries. Only with line_search=False and a fixed damping is the closure "
                "called once a step"
            )
