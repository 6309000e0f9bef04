"""Measuring: time as ratios of interleaved pairs, peak memory in a fresh process.

Times on a shared machine drift; a candidate and the baseline that ran a moment before it drift together, so each
round yields one ratio per candidate, and medians with quartiles are reported. Memory is the peak of the
resident set above what it was before the measured call, in a process that has run nothing else.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

Run = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """Time of a candidate over that of the baseline: median and quartiles over rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        """The ratios of the rounds, one or more."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if values[1:] else [values[0]] * 3
        return cls(median, low, high, len(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def paired_ratios(
    baseline: Run, candidates: Mapping[str, Run], *, rounds: int = 7, warmup: int = 1
) -> dict[str, Ratio]:
    """Returns the time of each candidate as a ratio to the baseline's in the same round.

    Args:
        baseline: called before every candidate.
        candidates: name -> what to time.
        rounds: how often, at least 1.
        warmup: calls of everything that are not timed.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    for _ in range(warmup):
        for run in (baseline, *candidates.values()):
            run()
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds):
        names = list(candidates)
        turn = number % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            base = _seconds(baseline)
            ratios[name].append(_seconds(candidates[name]) / base)
    return {name: Ratio.of(values) for name, values in ratios.items()}


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - start
    del result  # freed outside of the timed span, for candidates and baseline alike
    return elapsed


def peak_memory(target: str, timeout: float = 600.0, **arguments: Any) -> int:
    """Returns the bytes that a call takes at its peak, measured in a fresh process.

    Args:
        target: "module:function"; the function gets `arguments`, prepares everything (and warms up libraries), and
            returns what to measure: a function without arguments.
        timeout: seconds the process may take.
        arguments: what JSON can hold.

    Raises:
        RuntimeError: the process failed; the message ends with the last line of its error output.
    """
    command = [sys.executable, "-m", "persample.testing.measure", target, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"measuring {target} in a process of its own failed: {last}")
    return int(done.stdout.strip().splitlines()[-1])


def _peak_of(run: Run) -> int:
    """Growth of the resident set at its peak during the call, in bytes."""
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")  # resets the high-water mark
    except OSError:
        before = _high_water()  # elsewhere the mark is that of the whole process
    else:
        before = _status("VmRSS")
    result = run()
    peak = _high_water()
    del result
    return max(0, peak - before)


def _high_water() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def main() -> None:
    """Measures one target in this process and prints bytes."""
    target, arguments = sys.argv[1:3]
    module, _, function = target.partition(":")
    print(_peak_of(getattr(import_module(module), function)(**json.loads(arguments))))


if __name__ == "__main__":
    main()
