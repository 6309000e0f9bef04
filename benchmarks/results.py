"""Results as they are kept in JSON: what was measured on what machine, and the figures that reports are made of.

{"format": 1, "settings": {…}, "environment": {…}, "models": {name: model}}

model     date, load before and after, batch, bytes, fill speed, "variants": {key: entry}
entry     status, difference from ours, calls, rounds, wall and process seconds, peak memory in bytes
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persample.testing.machine import environment
from persample.testing.measure import Ratio

FORMAT = 1
PACKAGES = ("torch", "opacus", "backpack-for-pytorch", "torchjd", "numpy")

Results = dict[str, Any]


def new(settings: Mapping[str, Any], device: str) -> Results:
    """Results without a model."""
    return {"format": FORMAT, "settings": dict(settings), "environment": environment(device, PACKAGES), "models": {}}


def load(path: Path) -> Results:
    """Reads results.

    Raises:
        ValueError: the file is not there or was not written by this version.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; `python -m benchmarks --out {path}` writes one")
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} does not hold results of format {FORMAT}; measure again with another --out")
    return content


def save(results: Results, path: Path) -> None:
    """Writes results whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(_rounded(results), indent=1, allow_nan=False) + "\n")
    draft.replace(path)


def _rounded(value: Any) -> Any:
    """Six digits are more than any time has; infinity, which JSON lacks, becomes null."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value


def ratio(
    model: Mapping[str, Any], key: str, reference: str = "plain", *, plus: str | None = None, clock: str = "wall"
) -> Ratio | None:
    """Returns the time of `key` over that of `reference` (and `plus`), round by round; None without both."""
    entries = [model["variants"].get(name) for name in (key, reference, plus) if name is not None]
    if any(entry is None or not entry["wall"] for entry in entries):
        return None
    series = [dict(zip(entry["rounds"], entry[clock], strict=True)) for entry in entries]
    shared = sorted(set.intersection(*(set(one) for one in series)))
    if not shared:
        return None
    own, *others = series
    values = [own[number] / sum(one[number] for one in others) for number in shared]
    return Ratio.of(values)


def seconds(model: Mapping[str, Any], key: str, clock: str = "wall") -> float | None:
    """Median seconds of a call."""
    entry = model["variants"].get(key)
    return statistics.median(entry[clock]) if entry and entry[clock] else None


def memory_ratio(model: Mapping[str, Any], key: str, reference: str = "plain", *, when: str = "memory") -> float | None:
    """Peak memory of `key` over that of `reference`; `when` is "memory" or "memory_later"."""
    own, other = (model["variants"].get(name, {}).get(when) for name in (key, reference))
    return own / other if own is not None and other else None
