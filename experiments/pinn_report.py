"""Tables, figures and verdicts of `experiments.pinn`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

from experiments import evidence, tuning
from experiments.pinn_problems import TITLES
from experiments.record import Claim, Record, Result, Verdict

OURS = "gauss-newton"
NEEDED = {"poisson2": 100.0, "burgers": 10.0, "poisson5": 10.0}
"""How many times lower the error is to be than the best baseline's at equal wall time."""
POISSON_ERROR = 1e-5


def parsed(unit: str) -> tuple[str, str, int]:
    """Returns (problem, method, seed).

    >>> parsed("poisson2/adam/lr=0.01/seed=2")
    ('poisson2', 'adam/lr=0.01', 2)
    """
    problem, *method, seed = unit.split("/")
    return problem, "/".join(method), int(seed.removeprefix("seed="))


def runs(record: Record, problem: str, method: str) -> dict[int, Result]:
    """Results by seed."""
    found = {parsed(unit): result for unit, result in record.results.items()}
    return {seed: result for (name, own, seed), result in sorted(found.items()) if (name, own) == (problem, method)}


def figures(record: Record, problem: str, method: str, figure: str) -> list[float]:
    """A figure of the last evaluation by seed; inf for runs that diverged."""
    lasts = [result[figure][-1] for result in runs(record, problem, method).values()]
    return [math.inf if last is None else last for last in lasts]


def best_baseline(record: Record, problem: str) -> tuple[str, float] | None:
    """The baseline with the lowest median of final errors: its rate was chosen by that, in its favour."""
    medians = {
        method: median(errors)
        for method in record.settings["methods"]
        if method != OURS and (errors := figures(record, problem, method, "error"))
    }
    return min(medians.items(), key=lambda pair: pair[1]) if medians else None


def ratio(record: Record, problem: str) -> float | None:
    """Median error of the best baseline over ours; None where runs are missing."""
    ours, best = figures(record, problem, OURS, "error"), best_baseline(record, problem)
    return best[1] / median(ours) if ours and best else None


def spread(values: list[float]) -> str:
    return f"{median(values):.1e} ({min(values):.1e} to {max(values):.1e})" if values else "–"


def report(record: Record, titles: Mapping[str, str] = TITLES) -> str:
    """Returns a table for each problem: error, loss and steps of every method at the end of its budget."""
    s = record.settings
    lines = [
        f"# Least squares and differential equations, {record.scale} scale",
        f"{record.where()}. Median (range) over seeds at the end of the same {s['clock']} seconds; the error is "
        "relative, in L2, on points of its own (data: test error over the targets' spread). float64.",
    ]
    for problem, options in s["problems"].items():
        chosen = s["gauss_newton"][problem]
        lines += [
            f"## {titles[problem]}",
            f"{s['budget'][problem]:g} s a run. Problem: {options}. Gauss–Newton: {chosen}.",
            "| method | n | error | loss | steps |\n|---|---|---|---|---|\n"
            + "\n".join(
                f"| {method} | {len(runs(record, problem, method))} | "
                f"{spread(figures(record, problem, method, 'error'))} | "
                f"{spread(figures(record, problem, method, 'loss'))} | "
                f"{median(steps) if (steps := figures(record, problem, method, 'steps')) else 0:.0f} |"
                for method in s["methods"]
            ),
        ]
        factor, best = ratio(record, problem), best_baseline(record, problem)
        if factor is not None and best is not None:
            lines.append(f"Best baseline: {best[0]}. Its median error is {factor:.3g} times Gauss–Newton's.")
    return "\n\n".join(lines) + "\n"


def draw(record: Record, stem: Path, titles: Mapping[str, str] = TITLES) -> list[Path]:
    """Draws error against time, and solution with error of the problems in two variables."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    problems = [name for name in record.settings["problems"] if any(parsed(u)[0] == name for u in record.results)]
    if not problems:
        return []
    written = [stem.with_name(f"{stem.name}-error.png")]
    columns = min(4, len(problems))
    rows = -(-len(problems) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.6 * rows), squeeze=False)
    for axis in axes.flat[len(problems) :]:
        axis.set_axis_off()
    for axis, problem in zip(axes.flat, problems, strict=False):
        for number, method in enumerate(record.settings["methods"]):
            for place, result in enumerate(runs(record, problem, method).values()):
                pairs = [
                    (t, e) for t, e in zip(result["seconds"], result["error"], strict=True) if e is not None and e > 0
                ]
                if pairs:
                    label = method if place == 0 else None
                    axis.plot(*zip(*pairs, strict=True), color=f"C{number}", lw=1.2, alpha=0.8, label=label)
        axis.set(title=titles[problem], xlabel=f"{record.settings['clock']} seconds", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("relative error")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(written[0], dpi=110)
    plt.close(figure)
    pictures = {problem: _picture(record, problem) for problem in problems}
    shown = {problem: picture for problem, picture in pictures.items() if picture is not None}
    if shown:
        written.append(stem.with_name(f"{stem.name}-solution.png"))
        figure, axes = plt.subplots(len(shown), 2, figsize=(8, 3.2 * len(shown)), squeeze=False)
        for row, (problem, picture) in zip(axes, shown.items(), strict=True):
            for axis, name in zip(row, ("solution", "error"), strict=True):
                grid = picture[name]
                bound = max(abs(value) for line in grid for value in line)
                image = axis.imshow(
                    grid, extent=_turned(picture["extent"]), origin="lower", aspect="auto", cmap="RdBu_r",
                    vmin=-bound, vmax=bound,
                )  # fmt: skip
                figure.colorbar(image, ax=axis)
                axis.set(title=f"{titles[problem]}: {name}", xlabel=picture["axes"][1], ylabel=picture["axes"][0])
        figure.tight_layout()
        figure.savefig(written[1], dpi=100)
        plt.close(figure)
    return written


def _turned(extent: list[float]) -> list[float]:
    """Rows of a picture are its first variable, which is drawn upwards."""
    return [*extent[2:], *extent[:2]]


def _picture(record: Record, problem: str) -> dict | None:
    found = [result["picture"] for result in runs(record, problem, OURS).values() if result.get("picture")]
    return found[0] if found else None


def entered(record: Record, problem: str, *methods: str) -> dict[str, dict[int, bool]]:
    """By method, whether its run of a seed diverged."""
    return {
        method: {seed: result["error"][-1] is None for seed, result in runs(record, problem, method).items()}
        for method in methods
    }


def _edges(record: Record, method: str) -> dict[str, list[str]]:
    """Whether a baseline's rate is the smallest or the largest of those that were tried of its kind."""
    kind, _, rate = method.partition("/lr=")
    rates = [float(each.partition("/lr=")[2]) for each in record.settings["methods"] if each.startswith(f"{kind}/lr=")]
    return {method: tuning.at_edge({"lr": float(rate)}, tuning.grid(lr=rates))} if rate else {}


def judge_ratio(problem: str) -> Callable[[Record], Verdict | None]:
    """Whether the error is as many times lower as it is to be; the 2-D Poisson problem also has an error to reach."""

    def judge(record: Record) -> Verdict | None:
        factor, best = ratio(record, problem), best_baseline(record, problem)
        if factor is None or best is None:
            return None
        errors = figures(record, problem, OURS, "error")
        seconds = record.settings["budget"][problem]
        text = (
            f"{record.scale} scale, {seconds:g} {record.settings['clock']} s: median error "
            f"{spread(errors)}, best baseline ({best[0]}) {best[1]:.1e}, {factor:.3g} times as much"
        )
        reached = problem != "poisson2" or median(errors) <= POISSON_ERROR
        holds = factor >= NEEDED[problem]
        judgement = "holds" if holds and reached else "holds in part" if holds or reached else "does not hold"
        return evidence.verdict(text, judgement, [entered(record, problem, OURS, best[0])], _edges(record, best[0]))

    return judge


CLAIMS = tuple(
    Claim(f"{TITLES[problem]}, error ≥ {needed:g} times below the best of Adam and L-BFGS", judge_ratio(problem))
    for problem, needed in NEEDED.items()
)
