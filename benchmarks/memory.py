"""Peak memory of a variant, in a process that runs nothing else.

What counts is the growth over what was in use when libraries were loaded and model and batch were there. On the CPU
it is the resident set as Linux counts it without the pages of libraries' code (4 MiB of oneDNN in a linear model, which
every process on the machine shares), on CUDA the allocator's maximum. The process gives each larger allocation
pages of its own (`MALLOC_MMAP_THRESHOLD_`), so that the peak is not that of a fragmented heap.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.models import Problem, Task
from benchmarks.variants import VARIANTS, Step, Variant, stored_optimizer, training
from persample.testing.machine import quiet

CALLS = 3
PAGES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

del peers  # imported for its variants, which a fresh process would lack


@dataclass(frozen=True)
class Peak:
    """Bytes above model and batch."""

    whole: int
    """Of the first calls, in which graphs are analysed and momentum is made."""
    later: int
    """Of a call after those."""


def measure(problem: Problem, key: str, *, threads: int, repeats: int = 1, timeout: float = 600.0) -> Peak:
    """Returns the peaks, each the median of `repeats` processes.

    Raises:
        RuntimeError: a process failed; the message ends with the last line of its error output.
    """
    found = [json.loads(_ask(problem, key, threads, timeout)) for _ in range(repeats)]
    return Peak(*(int(statistics.median(column)) for column in zip(*found, strict=True)))


def _ask(problem: Problem, key: str, threads: int, timeout: float, coefficients: str = "") -> str:
    request = {**vars(problem), "changes": dict(problem.changes)}
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps([request, key, threads, coefficients])]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, env={**os.environ, **PAGES}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"measuring the memory of {key} on {problem.name} failed: {last}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def _main(request: dict[str, Any], key: str, threads: int, coefficients: str) -> None:
    problem, variant = Problem(**request), VARIANTS[key]
    torch.set_num_threads(threads)
    if coefficients:
        _save_coefficients(problem, Path(coefficients))
        return
    import_module(variant.module)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        loaded = _coefficients(problem, variant, threads, Path(folder) / "coefficients.pt")
        _load_libraries(problem, variant)
        task = problem.build()
        before = _start(problem.device)
        step = variant.prepare(task) if loaded is None else _with_coefficients(task, variant, loaded)
        for _ in range(CALLS):
            step.run()
            step.clear()
        peaks = [_peak(problem.device) - before]
        _start(problem.device)
        step.run()
        print(json.dumps([*peaks, _peak(problem.device) - before]))


def _load_libraries(problem: Problem, variant: Variant) -> None:
    """Runs the variant on the tiny model: much of torch, tens of MiB of it, is loaded at the first use."""
    tiny = Problem(problem.name, "tiny", problem.device)
    for used in (VARIANTS["plain"], variant):
        step = used.prepare(tiny.build())
        for _ in range(step.warmup):
            step.run()
            step.clear()
    gc.collect()


def _with_coefficients(task: Task, variant: Variant, coefficients: Any) -> Step:
    optimizer = stored_optimizer(task)
    optimizer.load_state_dict({**optimizer.state_dict(), "coefficients": coefficients})
    return Step(training(task, optimizer, compiled=variant.what == "compiled"))


def _coefficients(problem: Problem, variant: Variant, threads: int, path: Path) -> Any:
    """Coefficients for the steps that use stored ones, from one more process: computing them takes memory."""
    if not variant.key.startswith("stored"):
        return None
    _ask(problem, variant.key, threads, 600.0, str(path))
    return torch.load(path, weights_only=False)


def _save_coefficients(problem: Problem, path: Path) -> None:
    task = problem.build()
    optimizer = stored_optimizer(task)
    step = training(task, optimizer)
    while optimizer.state_dict()["coefficients"]["epoch"] == 0:
        step()
    torch.save(optimizer.state_dict()["coefficients"], path)


def _start(device: str) -> int:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    return _resident("VmRSS") - _resident("RssFile")


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM") - _resident("RssFile")  # code is loaded and stays: at the peak there was no more of it


def _resident(which: str) -> int:
    """Bytes of VmRSS (now), VmHWM (the peak) or RssFile (mapped from files, now); Linux alone tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which + ":"))


if __name__ == "__main__":
    _main(*json.loads(sys.argv[1]))
