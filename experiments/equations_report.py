"""Verdicts of `experiments.equations`: the bars to be reached in ten processor minutes, and that no seed is stuck."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from experiments import evidence
from experiments.equations_problems import TITLES
from experiments.pinn_report import OURS, best_baseline, entered, figures, spread
from experiments.record import Claim, Record, Verdict

BARS = {"burgers": 1e-6, "allen-cahn": 5e-6, "kdv": 1e-5, "helmholtz": 1e-6}
"""Relative error in L2."""
MINUTES = 10
AHEAD = 10.0
"""How many times lower than the best rival's."""
APART = 30.0
"""The worst seed may be this many times as far off as the median."""


def judge_bar(problem: str) -> Callable[[Record], Verdict | None]:
    """Whether the median is at most the bar, and `AHEAD` times below the best rival of the same record."""

    def judge(record: Record) -> Verdict | None:
        errors, best = figures(record, problem, OURS, "error"), best_baseline(record, problem)
        if record.settings["budget"][problem] != 60 * MINUTES or not errors:
            return None
        text = f"median error {spread(errors)}"
        reached, methods = median(errors) <= BARS[problem], [OURS]
        ahead = best is not None and best[1] >= AHEAD * median(errors)
        if best is None:
            text += "; no rival has been run"
        else:
            text += f"; best rival ({best[0]}) {best[1]:.1e}"
            methods.append(best[0])
        judgement = "holds" if reached and ahead else "holds in part" if reached or ahead else "does not hold"
        return evidence.verdict(text, judgement, [entered(record, problem, *methods)])

    return judge


def judge_seeds(record: Record) -> Verdict | None:
    """Whether no seed is far from the median of its problem."""
    problems = [name for name in record.settings["problems"] if figures(record, name, OURS, "error")]
    if len(problems) < len(record.settings["problems"]):
        return None
    ratios = {
        name: max(errors) / median(errors) for name in problems if (errors := figures(record, name, OURS, "error"))
    }
    worst = max(ratios, key=lambda name: ratios[name])
    text = f"{len(problems)} problems: the worst seed is {ratios[worst]:.2g} times the median, on {TITLES[worst]}"
    groups = [entered(record, name, OURS) for name in problems]
    return evidence.verdict(text, "holds" if ratios[worst] <= APART else "does not hold", groups)


CLAIMS = (
    *(
        Claim(
            f"{TITLES[name]}: relative error ≤ {bar:g} in {MINUTES} CPU minutes, {AHEAD:g} times below the best rival",
            judge_bar(name),
        )
        for name, bar in BARS.items()
    ),
    Claim(f"Gauss–Newton at its defaults: the worst seed within {APART:g} times the median", judge_seeds),
)
