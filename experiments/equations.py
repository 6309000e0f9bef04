"""Differential equations as the field poses them: Gauss–Newton at its defaults against five rivals.

All methods of a seed start from the same weights and get the same processor seconds on one thread (`--threads 1`); the
clock stands still while errors are measured. Points are drawn anew `draws` times, evenly over the first `redrawing` of
the budget, a part of them where the residuals of the moment are large (`adaptive`); the time this takes counts. Adam's
and SOAP's rates fall by 10⁻³ over the budget. Gauss–Newton has no option but the weights of the groups, which all have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from experiments.equations_problems import PROBLEMS, TITLES, Posed
from experiments.equations_report import CLAIMS
from experiments.pinn import followed
from experiments.pinn_report import draw, parsed, report
from experiments.record import Context, Experiment, Result, Settings
from experiments.rivals import Rival, SelfScaledBroyden, rival
from fngd.demo.race import gauss_newton

WIDE = [30, 30, 30]
SMALL: Settings = {
    "seeds": [0, 1, 2],
    "clock": "process",
    "points": 40,
    "draws": 10,
    "redrawing": 0.8,
    "adam_share": 0.3,
    "budget": dict.fromkeys(PROBLEMS, 60.0),
    "gauss_newton": {name: {} for name in PROBLEMS},
    "problems": {
        "burgers": {"hidden": WIDE, "points": 2500, "adaptive": 0.5},
        "allen-cahn": {
            "hidden": WIDE, "points": 2500, "adaptive": 0.5, "initial": 257, "weights": {"initial": 100.0},
        },
        "kdv": {"hidden": [30, 30, 28], "points": 2500, "adaptive": 0.3, "modes": 3},
        "helmholtz": {"hidden": WIDE, "points": 2500},
        "advection": {"hidden": WIDE, "points": 2500},
        "kovasznay": {"hidden": WIDE, "points": 900, "edge": 60, "weights": {"boundary 0": 10.0, "boundary 1": 10.0}},
        "inverse": {"hidden": [24, 24], "points": 1500, "adaptive": 0.5, "weights": {"data": 10.0}},
        "poisson5": {"hidden": [30, 30], "points": 1500, "boundary": 500, "weights": {"boundary": 100.0}},
        "poisson10": {"hidden": [30, 30], "points": 1500, "boundary": 500, "weights": {"boundary": 100.0}},
    },
    "methods": [
        "gauss-newton", "adam/lr=0.01", "adam/lr=0.003", "soap/lr=0.03", "soap/lr=0.01", "lbfgs", "adam-lbfgs/lr=0.01",
        "ssbroyden",
    ],
}  # fmt: skip
FULL: Settings = {
    **SMALL,
    "budget": dict.fromkeys(PROBLEMS, 600.0),
    "draws": 40,
    "problems": {
        **SMALL["problems"],
        "burgers": {"hidden": WIDE, "points": 3000, "adaptive": 0.5},
        "kdv": {"hidden": [30, 30, 28], "points": 3000, "adaptive": 0.3, "modes": 3},
    },
}
SMOKE: Settings = {
    **SMALL,
    "seeds": [0],
    "points": 4,
    "draws": 2,
    "budget": dict.fromkeys(PROBLEMS, 0.4),
    "problems": {
        **{name: {"hidden": [6], "points": 20, "adaptive": 0.5} for name in PROBLEMS},
        "allen-cahn": {"hidden": [6], "points": 20, "adaptive": 0.5, "initial": 9},
        "kovasznay": {"hidden": [6], "points": 20, "edge": 4},
        "poisson5": {"hidden": [6], "points": 20, "boundary": 10},
        "poisson10": {"hidden": [6], "points": 20, "boundary": 20},
    },
    "methods": ["gauss-newton", "adam/lr=0.01", "soap/lr=0.01", "lbfgs", "adam-lbfgs/lr=0.01", "ssbroyden"],
}


def units(settings: Settings) -> list[str]:
    """Ours on all problems and seeds, then the rivals: what is reported first is whether ours is ever stuck."""
    return [
        f"{problem}/{method}/seed={seed}"
        for method in settings["methods"]
        for seed in settings["seeds"]
        for problem in settings["problems"]
    ]


def moves(
    method: str, problem: Posed, elapsed: Callable[[], float], budget: float, settings: Settings
) -> Iterator[None]:
    """Makes one step each time it is asked, on new points when it is time for them."""
    draws, redrawing = settings["draws"], settings["redrawing"] * budget
    kind, _, option = method.partition("/lr=")
    share = {"adam-lbfgs": settings["adam_share"]}.get(kind, 1.0) * budget
    current = _mover(kind, problem, lambda: float(option) * 10 ** (-3 * min(1.0, elapsed() / share)), settings)
    switched, drawn = kind != "adam-lbfgs", 0
    while True:
        if drawn < draws and elapsed() >= (drawn + 1) * redrawing / draws:
            problem.draw()
            current.redrawn()
            drawn += 1
        if not switched and elapsed() >= share:
            current, switched = rival("lbfgs", problem, lambda: 0.0), True
        yield current()


def _mover(kind: str, problem: Posed, rate: Callable[[], float], settings: Settings) -> Rival | SelfScaledBroyden:
    if kind == "gauss-newton":
        return Rival(lambda: gauss_newton(problem, settings["options"])[0])
    return rival({"adam-lbfgs": "adam"}.get(kind, kind), problem, rate)


def run(unit: str, settings: Settings, context: Context) -> Result:
    """Trains for the budget; returns error and loss by time, and for two variables the picture."""
    name, method, seed = parsed(unit)
    own = {**settings, "options": settings["gauss_newton"][name]}
    tiny = PROBLEMS[name](0, SMOKE["problems"][name])
    warm = moves(method, tiny, lambda: 0.0, 1.0, own)
    for _ in range(2):  # first calls in a process load code, which is no property of a method
        next(warm)
    problem, budget = PROBLEMS[name](seed, settings["problems"][name]), settings["budget"][name]
    history = followed(problem, lambda elapsed: moves(method, problem, elapsed, budget, own), budget, settings, context)
    picture = problem.picture() if problem.picture is not None and method == "gauss-newton" else None
    return {**history, "picture": picture}


EXPERIMENT = Experiment(
    name="equations",
    help="Gauss-Newton on differential equations as the field poses them, against five rivals",
    source="published bars",
    scales={"small": SMALL, "full": FULL, "smoke": SMOKE},
    units=units,
    run=run,
    report=lambda record: report(record, TITLES),
    draw=lambda record, stem: draw(record, stem, TITLES),
    claims=CLAIMS,
    growing=("seeds", "methods"),
)
