"""What the commands of `python -m benchmarks` do, once their options are read."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import check, growth, memory, processes, report, results, timing
from benchmarks.models import SEED, Problem
from benchmarks.results import Results
from benchmarks.variants import Variant

FOLDER = Path(__file__).parent / "results"


def _opened(options: argparse.Namespace, kind: str) -> tuple[Path, Results]:
    """The results to go on with, or new ones.

    Raises ValueError where the file holds figures that were measured in another way.
    """
    torch.set_num_threads(options.threads)
    path = options.out or FOLDER / f"{kind}-{options.device.replace(':', '')}.json"
    names = ("device", "threads", "processes", "repeats", "size")
    settings = {name: getattr(options, name) for name in names if hasattr(options, name)}
    fresh = results.new({"kind": kind, "seed": SEED, **settings}, options.device)
    if not path.exists():
        return path, fresh
    found = results.load(path)
    for part in ("settings", "environment"):
        changed = [name for name, value in fresh[part].items() if found[part].get(name) != value]
        if changed:
            raise ValueError(f"{path} was measured with other {', '.join(changed)}; give another --out, or remove it")
    return path, found


def run(options: argparse.Namespace) -> int:
    """Measures model by model."""
    path, found = _opened(options, "speed")
    for name in options.models:
        problem = Problem(name, options.size, options.device)
        variants = timing.wanted(problem, options.what, peers=options.peers)
        model = found["models"].get(name, {"variants": {}})
        timed = bool(variants) and all(v.key in model["variants"] for v in variants)
        unweighed = [v.key for v in variants if not timed or not _weighed(model["variants"][v.key])]
        if timed and not (options.memory and unweighed):
            print(f"{name} is measured already", file=sys.stderr)
            continue
        start = time.monotonic()
        print(f"{name}: {len(variants)} variants …", file=sys.stderr)
        if not timed:
            model = _timed(problem, variants, options)
        if options.memory:
            for key in unweighed:
                _weigh(problem, key, model["variants"][key], options)
        found["models"][name] = model
        results.save(found, path)
        report.print_model(name, model)
        print(f"{name} took {time.monotonic() - start:.0f} s", file=sys.stderr)
    written = report.write(found, path)
    print("wrote", ", ".join(map(str, (path, *written))))
    return 0


def _timed(problem: Problem, variants: Sequence[Variant], options: argparse.Namespace) -> dict[str, Any]:
    model: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **timing.about(problem),
        "load_before": timing.load(),
        "fill": timing.fill_speed(options.device, 2**29 if options.size == "full" else 2**20),
    }
    rounds = {name: getattr(options, name) for name in ("processes", "repeats", "threads")}
    times = processes.measure(problem, [variant.key for variant in variants], **rounds, seed=SEED)
    model["load_after"] = timing.load()
    model["variants"] = {key: vars(entry) for key, entry in times.items()}
    return model


def _weighed(entry: dict[str, Any]) -> bool:
    return entry["status"] != "ok" or "memory" in entry


def _weigh(problem: Problem, key: str, entry: dict[str, Any], options: argparse.Namespace) -> None:
    if entry["status"] != "ok":
        return
    try:
        peak = memory.measure(problem, key, threads=options.threads, repeats=options.memory_repeats)
        entry["memory"], entry["memory_later"] = peak.whole, peak.later
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        entry["memory"] = entry["memory_later"] = None
        print(error, file=sys.stderr)


def run_growth(options: argparse.Namespace) -> int:
    """Measures point by point."""
    path, found = _opened(options, "growth")
    for axis, value in growth.points(options.size):
        if f"{axis}={value}" not in found["models"]:
            print(f"{axis} {value} …", file=sys.stderr)
            size, device = options.size, options.device
            growth.measure(found, axis, value, device=device, size=size, repeats=options.repeats, seed=SEED)
            results.save(found, path)
    growth.draw(found, path.with_suffix(".png"))
    print("wrote", path, "and", path.with_suffix(".png"))
    return 0


def run_report(options: argparse.Namespace) -> int:
    """Writes Markdown and figure."""
    print("wrote", ", ".join(map(str, report.write(results.load(options.file), options.file))))
    return 0


def run_check(options: argparse.Namespace) -> int:
    """Prints what is met and what is missed."""
    return 0 if check.show(results.load(options.file), options.clock) else 1


RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "measure": run,
    "growth": run_growth,
    "report": run_report,
    "check": run_check,
}
