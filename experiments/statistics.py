"""Means with spread, in one form for all tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return statistics.fmean(values) if values else math.nan


def std(values: Sequence[float]) -> float:
    """The standard deviation over seeds (n − 1); NaN of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def spread(values: Sequence[float], digits: int = 2, sign: bool = False) -> str:
    """Returns "mean ± standard deviation".

    >>> spread([1.0, 2.0, 3.0])
    '2.00 ± 1.00'
    """
    if not values:
        return "–"
    text = f"{mean(values):{'+' if sign else ''}.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {std(values):.{digits}f}"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns (lower quartile, median, upper quartile)."""
    if len(values) < 2:
        return (values[0],) * 3 if values else (math.nan,) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def paired(own: dict[int, float], other: dict[int, float]) -> list[float]:
    """Returns own − other for the seeds of both, in order.

    >>> paired({0: 1.0, 1: 2.0}, {1: 0.5, 2: 7.0})
    [1.5]
    """
    return [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; NaN of fewer than two values."""
    return std(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
