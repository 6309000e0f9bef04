"""What follows from a comparison, in a sentence: which differences exceed the spread over seeds, and what they cost.

Runs of one seed begin with the same weights and see the same batches, so differences are paired by seed. One exceeds
the spread where its 95 % interval by Student's t, mean ± t·s/√n, excludes 0. Seeds count that both optimisers have
finished; nothing is concluded from fewer than three, nor of an optimiser that diverged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from fngd.training.loop import Comparison

FEWEST = 3
"""Seeds below which nothing is concluded."""
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t with 1, 2, … degrees of freedom; the last one serves for all above."""

Epochs = Sequence[Mapping[str, float]]


def half_width(differences: Sequence[float]) -> float:
    """Returns t·s/√n, half of the 95 % interval of the mean; infinity for fewer than two.

    >>> round(half_width([1.0, 2.0, 3.0]), 2)
    2.48
    """
    if len(differences) < 2:
        return math.inf
    quantile = STUDENT[min(len(differences) - 1, len(STUDENT)) - 1]
    return quantile * statistics.stdev(differences) / math.sqrt(len(differences))


def conclude(comparison: Comparison, base: str) -> str:
    """Returns the sentences that go under the table; `base`: the optimiser that all others are compared with."""
    config = comparison.config
    reference, lost = _finished(comparison, base)
    others = [name for name in config.optimizers if name != base]
    if not others:
        return f"No conclusion: {base} ran alone."
    if lost:
        return (
            f"No conclusion: {base}, to which the others are compared, diverged in {lost} of {_runs(reference, lost)}."
        )
    apart: list[str] = []
    alike: list[str] = []
    left_out: list[str] = []
    for name in others:
        own, diverged = _finished(comparison, name)
        seeds = sorted(own.keys() & reference.keys())
        if diverged:
            left_out.append(f"{name} diverged in {diverged} of {_runs(own, diverged)}")
        elif len(seeds) < FEWEST:
            left_out.append(f"{name} has {len(seeds)} finished seed{'s' * (len(seeds) != 1)}, and {FEWEST} are needed")
        else:
            differences = [own[seed][-1]["test_accuracy"] - reference[seed][-1]["test_accuracy"] for seed in seeds]
            gain, error = statistics.fmean(differences), half_width(differences)
            cost = _cost(own, reference, seeds, base)
            text = f"{name} {gain:+.2f} ± {error:.2f} points over {len(seeds)} seeds, {cost}"
            (apart if abs(gain) > error else alike).append(text)
    parts = []
    if apart:
        parts.append(f"Beside {base}, test accuracy differs by more than the spread over seeds: {'; '.join(apart)}.")
    if alike:
        parts.append(f"No difference from {base} beyond the spread: {'; '.join(alike)}.")
    if apart or alike:
        parts.append("(±: 95 % interval of the difference, paired by seed.)")
    if left_out:
        parts.append(f"No conclusion: {'; '.join(left_out)}.")
    return " ".join(parts)


def _finished(comparison: Comparison, name: str) -> tuple[dict[int, Epochs], int]:
    """The runs by seed that have all their epochs, and how many others diverged."""
    runs = comparison.history.get(name, {})
    bad = {seed for seed, epochs in runs.items() if any(not math.isfinite(each["train_loss"]) for each in epochs)}
    whole: dict[int, Epochs] = {
        seed: e for seed, e in runs.items() if seed not in bad and len(e) == comparison.config.epochs
    }
    return whole, len(bad)


def _runs(finished: Mapping[int, Epochs], diverged: int) -> str:
    count = len(finished) + diverged
    return f"{count} run{'s' * (count != 1)}"


def _cost(own: Mapping[int, Epochs], reference: Mapping[int, Epochs], seeds: Sequence[int], base: str) -> str:
    spent, other = (sum(each["seconds"] for seed in seeds for each in runs[seed]) for runs in (own, reference))
    return f"at {spent / other:.2f} × the time of {base}" if other else "time not measured"
