"""What may be concluded from runs: the rules that every judging function applies before it says more than figures.

- n counts the seeds that entered: those in which every method compared has a run that did not diverge.
- A method with a diverged run gets no verdict; tables show the run as diverged.
- No verdict from fewer than `FEWEST` seeds.
- No verdict where the best trial of a method compared lies at the edge of its grid, in an option of which more than one
  value was tried: beyond it may lie a better one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.record import Verdict

FEWEST = 3

Entered = Mapping[str, Mapping[int, bool]]
"""By method: whether its run of a seed diverged."""


def count(groups: Sequence[Entered]) -> int:
    """Returns n: the fewest seeds, over the comparisons, in which no method diverged.

    >>> count([{"sgd": {0: False, 1: False}, "fngd": {0: False, 1: True, 2: False}}])
    1
    """
    sound = [[{seed for seed, lost in runs.items() if not lost} for runs in group.values()] for group in groups]
    return min((len(set.intersection(*each)) for each in sound if each), default=0)


def objections(groups: Sequence[Entered], edges: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns why nothing may be concluded; empty where something may.

    Arguments:
        groups: of each comparison (a task), what entered.
        edges: by method, the options whose best value is at the edge of what was tried.
    """
    found = [
        f"{method} diverged in {sum(runs.values())} of {len(runs)} runs"
        for group in groups
        for method, runs in group.items()
        if any(runs.values())
    ]
    found += [
        f"the best trial of {method} is at the edge of its grid ({', '.join(n)})" for method, n in edges.items() if n
    ]
    n = count(groups)
    if n < FEWEST:
        found.append(f"n = {n}, and {FEWEST} are needed")
    return found


def verdict(
    measured: str, judgement: str, groups: Sequence[Entered], edges: Mapping[str, Sequence[str]] | None = None
) -> Verdict:
    """Returns what was measured with n, and the judgement unless a rule forbids one."""
    against = objections(groups, edges or {})
    text = f"{measured.removesuffix('.')}; n = {count(groups)} seeds"
    return Verdict(f"{text}; no verdict: {'; '.join(against)}", "undecided") if against else Verdict(text, judgement)


def seeds(sound: int, diverged: int) -> str:
    """Returns a table's cell for the runs of a method.

    >>> seeds(2, 1)
    '2, and 1 diverged'
    """
    return f"{sound}, and {diverged} diverged" if diverged else f"{sound}"
