"""Least squares and physics-informed networks: Gauss–Newton against Adam, L-BFGS, and Adam followed by L-BFGS.

All methods of a seed start from the same weights, minimise the same loss on the same points, and get the same seconds
(`budget`, by problem; the clock stands still while errors are measured). Adam's rate falls by 10⁻³ over the budget.
Baselines run at several rates, and reports compare with the best of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

from experiments.pinn_problems import PROBLEMS, Problem
from experiments.pinn_report import CLAIMS, draw, parsed, report
from experiments.record import Context, Experiment, Result, Settings
from fngd.demo.race import adam, gauss_newton, lbfgs

SMALL: Settings = {
    "seeds": [0, 1, 2],
    "clock": "wall",
    "points": 40,
    "budget": {"poisson2": 20.0, "burgers": 10.0, "poisson5": 10.0, "diabetes": 3.0},
    "problems": {
        "poisson2": {"width": 64, "side": 30},
        "burgers": {
            "width": 24,
            "interior": 900,
            "viscosity": 0.1 / math.pi,
            "weights": {"initial": 10.0, "boundary": 10.0},
        },
        "poisson5": {"width": 24, "interior": 1600, "boundary": 400, "weights": {"boundary": 10.0}},
        "diabetes": {"width": 16},
    },
    "gauss_newton": {
        "poisson2": {"damping": 1e-9, "momentum": 0.9},
        "burgers": {"damping": "adaptive"},
        "poisson5": {"damping": 1e-6, "momentum": 0.9},
        "diabetes": {"damping": 1e-1},
    },
    "methods": ["gauss-newton", "adam/lr=0.01", "adam/lr=0.003", "adam/lr=0.001", "lbfgs", "adam-lbfgs/lr=0.003"],
    "adam_share": 0.3,
}
FULL: Settings = {
    **SMALL,
    "seeds": [0, 1, 2, 3, 4],
    "budget": {"poisson2": 60.0, "burgers": 60.0, "poisson5": 60.0, "diabetes": 10.0},
}
SMOKE: Settings = {
    **SMALL,
    "seeds": [0],
    "points": 4,
    "budget": dict.fromkeys(PROBLEMS, 0.4),
    "problems": {
        "poisson2": {"width": 8, "side": 6},
        "burgers": {"width": 8, "interior": 36, "viscosity": 0.1, "weights": {}},
        "poisson5": {"width": 8, "interior": 30, "boundary": 10, "weights": {}},
        "diabetes": {"width": 4},
    },
    "methods": ["gauss-newton", "adam/lr=0.01", "lbfgs", "adam-lbfgs/lr=0.003"],
}


def units(settings: Settings) -> list[str]:
    """Methods of one problem and seed follow each other, so that what the machine does meanwhile meets all alike."""
    return [
        f"{problem}/{method}/seed={seed}"
        for seed in settings["seeds"]
        for problem in settings["problems"]
        for method in settings["methods"]
    ]


def moves(
    method: str, problem: Problem, elapsed: Callable[[], float], budget: float, settings: Settings
) -> Iterator[None]:
    """Makes one step each time it is asked."""
    kind, _, option = method.partition("/lr=")
    if kind == "gauss-newton":
        move = gauss_newton(problem, settings["options"])[0]
        while True:
            yield move()
    share = {"adam": 1.0, "lbfgs": 0.0, "adam-lbfgs": settings["adam_share"]}[kind]
    if share:
        move = adam(problem, lambda: float(option) * 10 ** (-3 * min(1.0, elapsed() / (share * budget))))
        while elapsed() < share * budget:
            yield move()
    move = lbfgs(problem)
    while True:
        yield move()


def warm_up(name: str, method: str, settings: Settings) -> None:
    """Two steps on a tiny copy of the problem: first calls in a process load code, which is no property of a method."""
    tiny = PROBLEMS[name](0, SMOKE["problems"][name])
    steps = moves(method, tiny, lambda: 0.0, 1.0, {**settings, "options": settings["gauss_newton"][name]})
    for _ in range(2):
        next(steps)


def run(unit: str, settings: Settings, context: Context) -> Result:
    """Trains for the budget; returns error and loss by time, and for two variables the picture."""
    name, method, seed = parsed(unit)
    warm_up(name, method, settings)
    problem = PROBLEMS[name](seed, settings["problems"][name])
    budget, options = settings["budget"][name], {**settings, "options": settings["gauss_newton"][name]}
    history = followed(
        problem, lambda elapsed: moves(method, problem, elapsed, budget, options), budget, settings, context
    )
    picture = problem.picture() if problem.picture is not None and method == "gauss-newton" else None
    return {**history, "picture": picture}


def followed(
    problem: Problem,
    begin: Callable[[Callable[[], float]], Iterator[None]],
    budget: float,
    settings: Settings,
    context: Context,
) -> Result:
    """Error and loss by time, the clock standing still while they are measured.

    Arguments:
        begin: from the function that tells the seconds spent, to the steps; one is made each time it is asked.
        budget: of seconds of settings["clock"], "wall" or "process", with settings["points"] measurements.
    """
    now = {"wall": time.perf_counter, "process": time.process_time}[settings["clock"]]
    paused, start = 0.0, now()

    def elapsed() -> float:
        return now() - start - paused

    history: dict[str, list[float]] = {"seconds": [], "steps": [], "error": [], "loss": []}
    steps, due = 0, 0.0
    for _ in begin(elapsed):
        steps += 1
        passed = elapsed()
        if passed < due and passed < budget:
            continue
        stopped = now()
        for key, value in (
            ("seconds", passed), ("steps", steps), ("error", problem.error()), ("loss", problem.loss().item())
        ):  # fmt: skip
            history[key].append(value)
        due = passed + budget / settings["points"]
        context.progress(passed, budget, f"error {history['error'][-1]:.1e}")
        paused += now() - stopped
        if passed >= budget:
            break
    best = min(range(len(history["loss"])), key=lambda place: _or_inf(history["loss"][place]))
    return {**history, "final": history["error"][-1], "at_least_loss": history["error"][best]}


def _or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf


EXPERIMENT = Experiment(
    name="pinn",
    help="Gauss-Newton on residuals against Adam and L-BFGS",
    source="least squares and PDEs",
    scales={"small": SMALL, "full": FULL, "smoke": SMOKE},
    units=units,
    run=run,
    report=report,
    draw=draw,
    claims=CLAIMS,
    needs=("sklearn",),
    growing=("seeds",),
)
