"""Times of `experiments.step_time` put together: ratios to SGD and parts of an average step, over all processes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from experiments.record import Record, Result
from experiments.regions import REGIONS
from persample.testing.measure import Ratio

SHARES: dict[str, dict[str, float]] = {
    "kfac": {"plain": 0.90, "statistics": 0.09, "inverse": 0.01},
    "shampoo": {"plain": 0.90, "statistics": 0.09, "inverse": 0.01},
    "skfac": {"plain": 7 / 8, "inverse": 1 / 8},
}


def shares(method: str, epochs: int) -> dict[str, float]:
    """Returns how often each kind of step occurs; they add up to 1.

    >>> shares("fngd", 100)
    {'stored': 0.99, 'compute': 0.01}
    """
    if method == "fngd":
        return {"stored": 1 - 1 / epochs, "compute": 1 / epochs}
    return SHARES.get(method, {"step": 1.0})


def results(record: Record) -> dict[str, Result]:
    """Returns by model what all processes have measured, their rounds numbered through."""
    found: dict[str, Result] = {}
    for model in record.settings["models"]:
        each = [result for unit, result in record.results.items() if unit.partition("/")[0] == model]
        if each:
            times, parts = _joined_times(each), _joined([result["parts"] for result in each])
            found[model] = {**each[0], "processes": len(each), "times": times, "parts": parts}
    return found


def _joined_times(parts: list[Result]) -> dict[str, dict[str, list[float]]]:
    rounds = 1 + max((n for each in parts for entry in each["times"].values() for n in entry["round"]), default=0)
    numbered = [
        {key: {**entry, "round": [place * rounds + n for n in entry["round"]]} for key, entry in each["times"].items()}
        for place, each in enumerate(parts)
    ]
    keys = dict.fromkeys(key for each in numbered for key in each)
    return {key: _joined([each[key] for each in numbered if key in each]) for key in keys}


def _joined(lists: Iterable[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """By key, the entries of all."""
    total: dict[str, list[Any]] = {}
    for each in lists:
        for key, entries in each.items():
            total.setdefault(key, []).extend(entries)
    return total


def kinds(result: Result, method: str) -> list[str]:
    """The kinds of steps of a method that were timed."""
    return [key.partition("/")[2] for key in result["times"] if key.partition("/")[0] == method]


def by_round(
    result: Result, method: str, epochs: int, *, kind: str | None = None, clock: str = "wall"
) -> dict[int, float]:
    """Returns by round the time of a step (of one kind, or on average) over that of SGD.

    A kind that was not timed in every round (a decomposition) enters each with its median.
    """
    chosen = kinds(result, method) if kind is None else [kind]
    base = _times(result, "sgd/step", clock)
    if not chosen:
        return {}
    found = {}
    for number, plain in base.items():
        total = 0.0
        for each in chosen:
            own = _times(result, f"{method}/{each}", clock)
            time = own.get(number, statistics.median(result["times"][f"{method}/{each}"][clock]))
            total += time * (shares(method, epochs)[each] if kind is None else 1)
        found[number] = total / plain
    return found


def ratio(result: Result, method: str, epochs: int, *, kind: str | None = None, clock: str = "wall") -> Ratio | None:
    """Returns what `by_round` does as median and quartiles; None where nothing was timed."""
    found = by_round(result, method, epochs, kind=kind, clock=clock)
    if not found:
        return None
    return Ratio.of(list(found.values()))


def _times(result: Result, key: str, clock: str) -> dict[int, float]:
    entry = result["times"].get(key, {"round": [], clock: []})
    return dict(zip(entry["round"], entry[clock], strict=False))


def parts(result: Result, method: str, epochs: int) -> dict[str, float]:
    """Returns the seconds of an average step by region; {} where they were not taken.

    Where the decompositions take minutes only their total is known: what it has more than a step with statistics.
    """
    total = dict.fromkeys(REGIONS, 0.0)
    for kind in kinds(result, method):
        own = _parts(result, f"{method}/{kind}")
        if not own and kind == "inverse":
            own = _parts(result, f"{method}/statistics")
            times = [statistics.median(result["times"][f"{method}/{each}"]["wall"]) for each in (kind, "statistics")]
            own["solve"] = own.get("solve", 0.0) + max(0.0, times[0] - times[1])
        if not own:
            return {}
        for name in REGIONS:
            total[name] += shares(method, epochs)[kind] * own[name]
    return total


def _parts(result: Result, key: str) -> dict[str, float]:
    found = result["parts"].get(key, [])
    return {name: statistics.median(each[name] for each in found) for name in REGIONS} if found else {}
