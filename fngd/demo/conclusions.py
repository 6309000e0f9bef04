"""What follows from what was found, one sentence for each of the three questions; nothing is said that was not seen."""

from __future__ import annotations

from collections.abc import Sequence

from fngd.demo.cost import LOOP, Cost
from fngd.demo.race import Curve
from fngd.demo.verdicts import OURS, Verdict


def of_verdicts(found: Sequence[Verdict]) -> str:
    """Returns who is exact, and who is wrong without a word."""
    libraries = list(dict.fromkeys(v.library for v in found))
    models = len({v.model for v in found})

    def count(library: str, verdict: str) -> int:
        return sum(v.library == library and v.verdict == verdict for v in found)

    ours = f"{OURS} is exact on {count(OURS, 'exact')} of {models} models"
    wrong = [f"{library} {count(library, 'wrong')}" for library in libraries if count(library, "wrong")]
    if not wrong:
        return f"{ours}. Nobody is wrong."
    return f"{ours}. Wrong, without an error: {', '.join(wrong)}."


def of_costs(found: Sequence[Cost]) -> str:
    """Returns from what to what each quantity costs over the models, beside one sample at a time."""
    calls = [call for call in found[0].ratios if call != LOOP]

    def span(call: str, digits: int) -> str:
        values = sorted(cost.ratios[call].median for cost in found)
        low, high = f"{values[0]:.{digits}f}", f"{values[-1]:.{digits}f}"
        return low if low == high else f"{low} to {high}"

    parts = [f"{call} {span(call, 1)}" for call in calls]
    return f"In plain training steps: {', '.join(parts)}. Norms, one sample at a time: {span(LOOP, 0)}."


def of_race(curves: Sequence[Curve]) -> str:
    """Returns how far the errors are apart at the end."""
    ours, *others = curves
    best = min(others, key=lambda curve: curve.error[-1])
    factor = best.error[-1] / ours.error[-1]
    if not factor > 1:
        return (
            f"{ours.method} is not ahead after {ours.seconds[-1]:.0f} s: {best.method}'s error is {factor:.2g} of it."
        )
    return (
        f"After {ours.seconds[-1]:.0f} s {ours.method}'s error is {ours.error[-1]:.0e}, that of the next best, "
        f"{best.method}, {factor:,.0f} times as large."
    )
