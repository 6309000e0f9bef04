"""`python -m benchmarks`: time and memory of everything we offer beside plain training and other libraries.

python -m benchmarks [--models …] [--what …] [--no-peers] [--out FILE.json]    measure; goes on where it stopped,
                                                                               memory may follow later
python -m benchmarks report FILE.json        Markdown and figure, beside the file
python -m benchmarks check FILE.json         targets met and missed, peers that are faster
python -m benchmarks growth [--out FILE.json]    growth with batch, width, positions, depth
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import check, growth, memory, processes, report, results, timing
from benchmarks.models import MODELS, SEED, Problem
from benchmarks.results import Results
from benchmarks.variants import WHATS, Variant
from persample.testing.command_line import whole
from persample.testing.start import add_version

FOLDER = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 where a target is missed, 130 when interrupted. Exits with 2 on a mistake."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given.pop(0) if given and given[0] in COMMANDS else "measure"
    parser = _parser(command)
    options = parser.parse_args(given)
    missing = [name for name in ("rich", "matplotlib") if find_spec(name) is None]
    if missing:
        parser.error(f"{missing[0]} is not installed; it comes with the bench extra: pip install -e '.[bench]'")
    try:
        return COMMANDS[command](options)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last model that was finished", file=sys.stderr)
        return 130


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks" + ("" if command == "measure" else f" {command}"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="models:\n" + "".join(f"  {name:18}{spec.help}\n" for name, spec in MODELS.items())
        + "what:\n" + "".join(f"  {name:18}{text}\n" for name, text in WHATS.items()),
    )  # fmt: skip
    add_version(parser, "benchmarks")
    add = parser.add_argument
    if command in ("report", "check"):
        add("file", type=Path, metavar="FILE.json", help="what a measurement wrote")
        if command == "check":
            add("--clock", choices=results.CLOCKS, default="wall", help="wall time, or processor time (default wall)")
        return parser
    if command == "measure":
        everything = [name for name in WHATS if name != "compiled"]
        add("--models", type=_some(MODELS), default=list(MODELS), metavar="A,B,…", help="default all")
        add("--what", type=_some(WHATS), default=everything, metavar="A,B,…", help="default all but compiled")
        add("--peers", action=argparse.BooleanOptionalAction, default=True, help="other libraries, where installed")
        add("--memory", action=argparse.BooleanOptionalAction, default=True, help="peak memory, in fresh processes")
        add("--processes", type=whole(), default=3, metavar="N", help="fresh processes that time (default 3)")
        add("--memory-repeats", type=whole(), default=3, metavar="N", help="processes a variant (default 3)")
    add("--device", default="cpu", metavar="NAME", help="cpu (default), cuda, cuda:1, …")
    add("--threads", type=whole(), default=2, metavar="N", help="threads of torch (default 2)")
    rounds, where = (15, "") if command == "growth" else (5, " in each process")
    add("--repeats", type=whole(), default=rounds, metavar="N", help=f"interleaved rounds{where} (default {rounds})")
    add("--size", choices=("full", "tiny"), default="full", help="tiny models, to try the command out")
    name = "growth" if command == "growth" else "speed"
    add("--out", type=Path, default=None, metavar="FILE.json", help=f"default benchmarks/results/{name}-DEVICE.json")
    return parser


def _some(known: dict[str, Any]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}: choose from {', '.join(known)}")
        return names

    return parse


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


COMMANDS = {"measure": run, "growth": run_growth, "report": run_report, "check": run_check}

if __name__ == "__main__":
    sys.exit(main())
