"""Times of several variants, interleaved: every round runs each of them once, in an order drawn anew.

A machine that others use drifts, and what ran a moment ago drifts along, so ratios are taken within a round. Wall
time and the processor time of the process are both kept: the second hardly depends on what else runs.
"""

from __future__ import annotations

import importlib.util
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import Problem
from benchmarks.options import MODELS
from benchmarks.variants import OURS, STEPS, VARIANTS, Step, Variant, rows_nbytes
from persample.testing.machine import quiet

SHORTEST = 0.02
"""Seconds: shorter steps are repeated within a repetition until they take about that long."""
LONGEST = 20.0
"""Seconds that a variant may take in all; slower ones get fewer repetitions, but `FEWEST`."""
FEWEST = 5
TOLERANCE = 1e-2
"""Relative difference from ours at which a peer's result is called wrong; float32 rounds to 1e-4 at the worst."""


@dataclass
class Times:
    """What became of one variant on one model."""

    status: str = "ok"
    """ "ok", or why there are no times: "refused: …", "wrong: …", "not installed"."""
    difference: float | None = None
    """From our result, in relative norm."""
    calls: int = 1
    """Calls in one repetition."""
    rounds: list[int] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    """Seconds of a call, by repetition."""
    process: list[float] = field(default_factory=list)
    """Processor seconds of a call, all threads together."""


def wanted(problem: Problem, whats: Sequence[str], *, peers: bool) -> list[Variant]:
    """Returns the variants to measure, references and limits included, ours first."""
    chosen = [
        variant
        for variant in VARIANTS.values()
        if variant.what in whats
        and (peers or variant.library == OURS)
        and (variant.what in STEPS or not problem.spec.couples)
    ]
    keys = {key for variant in chosen for key in (variant.key, variant.reference, variant.limit) if key}
    return sorted((VARIANTS[key] for key in keys | {"plain"}), key=lambda variant: variant.library != OURS)


def installed(variant: Variant) -> bool:
    """Whether the variant's library is there."""
    return importlib.util.find_spec(variant.module) is not None


def measure(
    problem: Problem, variants: Sequence[Variant], *, repeats: int, seed: int = 0, first: int = 0
) -> dict[str, Times]:
    """Returns times by variant key, in this process; `first` is the number of its first round."""
    times = {variant.key: Times() for variant in variants}
    steps: dict[str, Step] = {}
    ours: dict[str, Any] = {}
    with quiet():
        for variant in variants:
            step, times[variant.key].status = prepare(problem, variant)
            if step is None:
                continue
            result = _first(step, times[variant.key], variant)
            if times[variant.key].status == "ok":
                _compare(variant, result, ours, times[variant.key])
            del result
            step.clear()
            if times[variant.key].status == "ok":
                steps[variant.key] = step
                _warm_up(step, times[variant.key], problem.device)
        for number in range(first, first + repeats):
            order = list(steps)
            random.Random(seed + number).shuffle(order)
            for key in order:
                own = times[key]
                if len(own.wall) < FEWEST or sum(own.wall) * own.calls < LONGEST:
                    wall, process = _time(steps[key], own.calls, problem.device)
                    own.rounds.append(number)
                    own.wall.append(wall)
                    own.process.append(process)
    return times


def prepare(problem: Problem, variant: Variant) -> tuple[Step | None, str]:
    """Returns the step of a variant on a task of its own, and "ok" or why there is none."""
    if not installed(variant):
        return None, f"not installed: {variant.package}"
    try:
        return variant.prepare(problem.build()), "ok"
    except Exception as error:
        return None, refusal(variant, error)


def refusal(variant: Variant, error: Exception) -> str:
    """What a library said, in a line; our own errors are not caught."""
    if variant.library == OURS:
        raise error
    words = " ".join(str(error).split())
    return f"refused: {type(error).__name__}: {words[:150]}"


def about(problem: Problem) -> dict[str, Any]:
    """What results are to be seen against."""
    task = problem.build()
    parameters = sum(parameter.nbytes for parameter in task.model.parameters())
    words = MODELS[problem.name] if problem.size == "full" and not problem.changes else f"in size {problem.size}"
    return {"help": words, "batch": task.batch, "parameter_bytes": parameters, "grads_bytes": rows_nbytes(task)}


def fill_speed(device: str, nbytes: int = 2**29, repeats: int = 5) -> dict[str, float]:
    """Returns the speed at which memory can be written, in GB/s (10⁹): fresh and touched before."""
    size = nbytes // 4
    buffer = torch.empty(size, device=device).fill_(0.0)
    touched = min(_time(Step(lambda: buffer.fill_(1.0)), 1, device)[0] for _ in range(repeats))
    fresh = min(_time(Step(lambda: torch.empty(size, device=device).fill_(1.0)), 1, device)[0] for _ in range(repeats))
    return {"touched": nbytes / touched / 1e9, "fresh": nbytes / fresh / 1e9}


def load() -> float | None:
    """Mean number of running processes in the last minute, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _first(step: Step, times: Times, variant: Variant) -> Any:
    try:
        return step.run()
    except Exception as error:
        times.status = refusal(variant, error)
        return None


def _compare(variant: Variant, result: Any, ours: dict[str, Any], times: Times) -> None:
    """Keeps our result as the truth for peers, or compares a peer's with it."""
    if result is None:
        return
    if variant.library == OURS:
        ours.setdefault(variant.what, _copied(result))
    elif variant.what in ours:
        times.difference = difference(result, ours[variant.what])
        if not times.difference <= TOLERANCE:
            times.status = f"wrong: relative difference {times.difference:.1g}"


def _copied(result: Any) -> Any:
    return {name: value.clone() for name, value in result.items()} if isinstance(result, Mapping) else result.clone()


def difference(result: Any, truth: Any) -> float:
    """‖result − truth‖ / ‖truth‖, over all entries; infinite where shapes differ."""
    given, expected = (value if isinstance(value, Mapping) else {"": value} for value in (result, truth))
    if {n: tuple(v.shape) for n, v in given.items()} != {n: tuple(v.shape) for n, v in expected.items()}:
        return float("inf")
    missed = sum(_square(given[name].detach() - expected[name]) for name in expected)
    return (missed / max(sum(_square(value) for value in expected.values()), 1e-300)) ** 0.5


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2


def _warm_up(step: Step, times: Times, device: str) -> None:
    """Runs the step until it is in its stride, and decides how many calls make one repetition."""
    for _ in range(step.warmup - 1):
        step.run()
        step.clear()
    seconds = min(_time(step, 1, device)[0] for _ in range(2))
    times.calls = max(1, min(50, round(SHORTEST / max(seconds, 1e-6))))


def _time(step: Step, calls: int, device: str) -> tuple[float, float]:
    """Wall and processor seconds of one call; results are freed, and clearing up is done, outside of the span."""
    wall = process = 0.0
    for _ in range(calls):
        _synchronize(device)
        start, start_process = time.perf_counter(), time.process_time()
        result = step.run()
        _synchronize(device)
        wall += time.perf_counter() - start
        process += time.process_time() - start_process
        del result
        step.clear()
    return wall / calls, process / calls


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
