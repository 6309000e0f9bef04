"""Gauss–Newton on a Poisson equation against Adam and L-BFGS, for equal seconds of the processor.

All start from the same weights and minimise the same loss on the same points; the clock stands still while errors are
measured. Adam's rate falls by 10⁻³ over the time it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fngd.demo.poisson import Problem, poisson2
from fngd.least_squares import GaussNewton

SECONDS = 6.0
SIZE = {"width": 32, "side": 20}
OPTIONS = {"damping": 1e-9, "momentum": 0.9}
RATE = 1e-2
POINTS = 60
"""How often the error is measured."""

Move = Callable[[], None]


@dataclass
class Curve:
    """Relative error in L2 by seconds of one method, and the steps it has made by then."""

    method: str
    seconds: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


def gauss_newton(problem: Problem, options: dict[str, Any]) -> tuple[Move, GaussNewton]:
    """A step of ours."""
    opt = GaussNewton(problem.net, weights=problem.weights, **options)

    def move() -> None:
        opt.step(problem.residuals)

    return move, opt


def adam(problem: Problem, rate: Callable[[], float]) -> Move:
    """A step of Adam at the rate of the moment."""
    opt = torch.optim.Adam(problem.net.parameters())

    def move() -> None:
        opt.param_groups[0]["lr"] = rate()
        opt.zero_grad()
        problem.loss().backward()
        opt.step()

    return move


def lbfgs(problem: Problem) -> Move:
    """Twenty iterations of torch's L-BFGS with a strong Wolfe search; tolerances never stop it."""
    opt = torch.optim.LBFGS(
        problem.net.parameters(), max_iter=20, history_size=100, line_search_fn="strong_wolfe",
        tolerance_grad=0.0, tolerance_change=0.0,
    )  # fmt: skip

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    def move() -> None:
        opt.step(closure)

    return move


METHODS: dict[str, Callable[[Problem, Callable[[], float]], Move]] = {
    "Gauss–Newton": lambda problem, passed: gauss_newton(problem, OPTIONS)[0],
    "L-BFGS": lambda problem, passed: lbfgs(problem),
    "Adam": lambda problem, passed: adam(problem, lambda: RATE * 10 ** (-3 * min(1.0, passed()))),
}
"""Method -> from a problem, and the share of the time that has passed, to its step."""


def race(
    seconds: float = SECONDS, *, seed: int = 0, progress: Callable[[str], None] = lambda text: None
) -> list[Curve]:
    """Returns a curve for each method; `progress` is called with the name of each."""
    curves = []
    for method in METHODS:
        progress(method)
        tiny = METHODS[method](poisson2(seed, {"width": 4, "side": 4}), lambda: 0.0)
        tiny()  # first calls in a process load code, which is no property of a method
        curves.append(Curve(method))
        for passed, steps, error in _course(method, poisson2(seed, SIZE), seconds):
            curves[-1].seconds.append(passed)
            curves[-1].steps.append(steps)
            curves[-1].error.append(error)
    return curves


def _course(method: str, problem: Problem, seconds: float) -> Iterator[tuple[float, int, float]]:
    """Yields (seconds, steps, error) from the start to the end of the time."""
    clock, paused, start = time.process_time, 0.0, time.process_time()
    move = METHODS[method](problem, lambda: (clock() - start - paused) / seconds)
    yield 0.0, 0, problem.error()
    steps, due, paused = 0, 0.0, clock() - start
    while (passed := clock() - start - paused) < seconds:
        move()
        steps += 1
        stopped = clock()
        passed = stopped - start - paused
        if passed >= min(due, seconds):
            yield passed, steps, problem.error()
            due = passed + seconds / POINTS
            paused += clock() - stopped
