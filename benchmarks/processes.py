"""Times from several processes, one after the other, each with its share of the rounds.

Where the memory of a process lies, and how much of it the C library gives back between steps, stays much the same for
as long as it lives: on ResNet-20 the step with stored coefficients took 0.90, 1.04, 1.06, 1.08 and 1.10 plain steps in
five processes of 15 rounds each. One process shows one such state; medians over several are of the code.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks import peers, timing
from benchmarks.models import Problem
from benchmarks.timing import Times
from benchmarks.variants import VARIANTS

del peers  # imported for its variants, which a fresh process would lack


def measure(
    problem: Problem, keys: Sequence[str], *, processes: int, repeats: int, threads: int, seed: int = 0
) -> dict[str, Times]:
    """Returns times by variant key, of `repeats` rounds in each of the processes; rounds are numbered through.

    A variant that one of the processes refuses, or finds wrong, has no times.
    """
    total: dict[str, Times] = {}
    for number in range(processes):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            task = fresh.submit(_measure, problem, tuple(keys), repeats, threads, seed, number * repeats)
            for key, found in task.result().items():
                total[key] = found if key not in total else joined(total[key], found)
    return total


def joined(before: Times, found: Times) -> Times:
    """The times of a variant in some processes and in one more."""
    for one in (before, found):
        if one.status != "ok":
            return Times(one.status, one.difference)
    worst = max((each.difference for each in (before, found) if each.difference is not None), default=None)
    series = ((*getattr(before, name), *getattr(found, name)) for name in ("rounds", "wall", "process"))
    return Times("ok", worst, before.calls, *map(list, series))


def _measure(
    problem: Problem, keys: Sequence[str], repeats: int, threads: int, seed: int, first: int
) -> dict[str, Times]:
    torch.set_num_threads(threads)
    return timing.measure(problem, [VARIANTS[key] for key in keys], repeats=repeats, seed=seed, first=first)
