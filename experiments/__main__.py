"""`python -m experiments NAME`: measures a table or figure of the papers; goes on where it stopped.

python -m experiments NAME --scale small     results, tables and figures in experiments/results
python -m experiments all --scale small      every experiment, one after the other
python -m experiments draw [NAME …]          figures and tables again, from the results alone
python -m experiments verdicts               fills the table of experiments/README.md from the results
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from experiments import record as records
from experiments import tuning, verdicts
from experiments.record import FOLDER, SCALES, Context, Experiment, Record, Stopped
from fngd.training.data import DataError
from fngd.training.report import writable
from persample.testing.command_line import check_device, console, stop_flag, whole
from persample.testing.start import add_version


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 130 where units are left, 1 where `all` failed. Exits with 2 on a mistake."""
    known = records.experiments()
    parser = _parser(known)
    options = parser.parse_args(arguments)
    try:
        if options.command in ("verdicts", "draw") and not options.out.is_dir():
            raise ValueError(f"--out {options.out} is no folder; give the one that holds the results")
        if options.command == "verdicts":
            return verdicts.write(known, options.out, options.readme)
        if options.command == "draw":
            unknown = [name for name in options.names if name not in known]
            if unknown:
                raise ValueError(f"{', '.join(unknown)}: unknown; the experiments are {', '.join(known)}")
            return _draw_all([known[name] for name in options.names or known], options.out)
        if options.command == "all":
            return _run_all(known, options)
        return _run(known[options.command], options)
    except (ValueError, DataError) as error:
        parser.error(str(error))


def _parser(known: dict[str, Experiment]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_version(parser, "experiments")
    commands = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    for experiment in known.values():
        command = commands.add_parser(experiment.name, help=f"{experiment.source}: {experiment.help}")
        command.description = f"{experiment.source}: {experiment.help}."
        _add_common(command, [scale for scale in SCALES if scale in experiment.scales])
        add = command.add_argument
        add("--only", default="*", metavar="A,B,…", help="units to run, by patterns such as 'fngd/*' (default all)")
        add("--set", action="append", default=[], metavar="NAME=JSON", help="another setting than the scale's")
        if any({"methods", "trials"} <= settings.keys() for settings in experiment.scales.values()):
            add("--optimizers", metavar="A,B,…", help="other methods than the scale's: names, or module:function")
        add("--list", action="store_true", help="print the settings and the units, and which are finished")
    every = commands.add_parser("all", help="every experiment; what cannot run is told at the end")
    every.set_defaults(only="*", set=[], list=False)
    _add_common(every, list(SCALES))
    draw = commands.add_parser("draw", help="figures and tables from the results alone")
    draw.add_argument("names", nargs="*", metavar="NAME", help="default all")
    verdict = commands.add_parser("verdicts", help="fill the claim-by-claim table of README.md from the results")
    verdict.add_argument("--readme", type=Path, default=verdicts.README, metavar="FILE", help="default %(default)s")
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="where results are kept")
    return parser


def _add_common(command: argparse.ArgumentParser, scales: list[str]) -> None:
    add = command.add_argument
    add("--scale", choices=scales, default="small", help="small fits 2 CPU cores, full is the paper's (for a GPU)")
    add("--device", default="cpu", metavar="NAME", help="cpu (default), cuda, cuda:1, …")
    add("--threads", type=whole(), default=None, metavar="N", help="threads of torch (default: torch's)")
    add("--data-dir", type=Path, default=None, metavar="DIR", help="the folder of the data sets")
    add("--minutes", type=_minutes, default=None, metavar="M", help="stop each experiment after about M minutes")


def _run_all(known: dict[str, Experiment], options: argparse.Namespace) -> int:
    """Runs what has this scale. An experiment that --minutes cut short is no failure, one that cannot run is."""
    outcomes, failed = {}, False
    for name, experiment in known.items():
        if options.scale not in experiment.scales:
            continue
        print(f"== {name}", file=sys.stderr)
        try:
            code = _run(experiment, options)
            outcomes[name] = "finished" if code == 0 else "unfinished; the same command goes on"
            if code and options.minutes is None:  # Ctrl-C
                break
        except (ValueError, DataError) as error:
            outcomes[name], failed = f"FAILED: {error}", True
    print("\n".join(f"{name:14}{outcome}" for name, outcome in outcomes.items()))
    unfinished = options.minutes is None and any(outcome.startswith("unfinished") for outcome in outcomes.values())
    return 1 if failed else 130 if unfinished else 0


def _run(experiment: Experiment, options: argparse.Namespace) -> int:
    absent = records.missing(experiment)
    if absent:
        raise ValueError(f"{', '.join(absent)}: not installed; pip install -e '.[experiments]' brings what is needed")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    check_device(options.device)
    settings = {**experiment.scales[options.scale], **_changes(options.set, experiment.scales[options.scale])}
    if getattr(options, "optimizers", None) is not None:
        settings["methods"] = _methods(options.optimizers)
    path = records.file_of(options.out, experiment.name, options.scale, options.device)
    record = records.open_record(experiment, options.scale, options.device, settings, path)
    every = list(experiment.units(record.settings))
    patterns = [pattern.strip() for pattern in options.only.split(",")]
    chosen = [unit for unit in every if any(fnmatchcase(unit, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(f"--only {options.only}: no unit is called so; the units are {', '.join(every)}")
    if options.list:
        print(json.dumps(record.settings, indent=1))
        print("\n".join(f"{'finished' if unit in record.units else 'to do':9}{unit}" for unit in every))
        return 0
    writable(options.out)
    complete = _work(experiment, record, path, chosen, options)
    written = _present(experiment, record, path)
    print("wrote", ", ".join(map(str, (path, *written))))
    if not complete:
        print("unfinished; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _work(experiment: Experiment, record: Record, path: Path, chosen: list[str], options: argparse.Namespace) -> bool:
    """Runs what is missing; returns whether nothing of `chosen` is."""
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    todo = [unit for unit in chosen if unit not in record.units]
    bars = _bars(experiment.name, len(chosen), len(chosen) - len(todo))
    with stop_flag("as soon as the unit allows") as flag, bars as (show, advance):
        for unit in todo:
            if path.is_file() and unit in records.load_record(path).units:  # another process was faster
                advance(unit)
                continue
            folder = path.with_suffix(".unfinished")
            checkpoint = folder / (unit.replace("/", "--") + ".pt")
            context = Context(
                options.device,
                options.data_dir,
                checkpoint,
                show=lambda done, total, text, unit=unit: show(unit, done, total, text),  # type: ignore[misc]
                stopping=lambda: bool(flag) or (end is not None and time.monotonic() > end),
            )
            before, seconds = records.load_average(), records.stopwatch()
            try:
                context.progress(0, 1, "")
                result = experiment.run(unit, record.settings, context)
            except Stopped:
                return False
            record.add(unit, result, seconds(), [before, records.load_average()], path)
            checkpoint.unlink(missing_ok=True)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
            advance(unit)
    return True


def _present(experiment: Experiment, record: Record, path: Path) -> list[Path]:
    """Writes tables and figures of what there is."""
    if not record.units:
        return []
    from rich.markdown import Markdown

    text = experiment.report(record)
    console().print(Markdown(text))
    table = path.with_suffix(".md")
    table.write_text(text.rstrip() + "\n")
    return [table, *experiment.draw(record, path.with_suffix(""))]


def _draw_all(chosen: list[Experiment], folder: Path) -> int:
    for experiment in chosen:
        for path in verdicts.files(folder, experiment.name):
            print("wrote", ", ".join(map(str, _present(experiment, records.load_record(path), path))))
    return 0


def _changes(given: list[str], known: dict[str, Any]) -> dict[str, Any]:
    result = {}
    for entry in given:
        name, equals, text = entry.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--set {entry}: give it as NAME=JSON, NAME being one of {', '.join(known)}")
        try:
            result[name] = json.loads(text)
        except ValueError:
            raise ValueError(f"--set {entry}: {text!r} is no JSON; texts need quotes: --set '{name}=\"…\"'") from None
    return result


def _methods(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ValueError(f"--optimizers {text!r} names none; choose from {', '.join(tuning.OPTIMISERS)}")
    for name in names:  # before any work
        tuning.optimiser(name)
    return names


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes: at least 0, such as 30 or 0.5")
    return minutes


@contextmanager
def _bars(name: str, total: int, finished: int) -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description:36}", markup=False), BarColumn(bar_width=30), MofNCompleteColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=console(stderr=True)) as bars:
        whole = bars.add_task(f"units of {name}", total=total, completed=finished)
        inner = bars.add_task("", total=None)

        def show(unit: str, done: float, of: float, text: str) -> None:
            bars.update(inner, description=f"{unit} {text}".strip(), completed=done, total=of)

        yield show, lambda unit: bars.advance(whole)


if __name__ == "__main__":
    sys.exit(main())
