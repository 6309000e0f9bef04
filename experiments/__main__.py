"""`python -m experiments NAME`: measures a table or figure of the papers; goes on where it stopped.

python -m experiments NAME --scale small     results, tables and figures in experiments/results
python -m experiments all --scale small      every experiment, one after the other
python -m experiments draw [NAME …]          figures and tables again, from the results alone
python -m experiments verdicts               fills the table of experiments/README.md from the results
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from experiments import record as records
from experiments import verdicts
from experiments.options import declared, parser
from experiments.record import Context, Experiment, Record, Stopped
from persample.testing.command_line import check_device, console, stop_flag
from persample.testing.start import complete


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 130 where units are left, 1 where `all` failed. Exits with 2 on a mistake."""
    promised = declared()
    top = parser(promised, __doc__ or "")
    options = top.parse_args(arguments)
    try:
        if options.command in ("verdicts", "draw") and not options.out.is_dir():
            raise ValueError(f"--out {options.out} is no folder; give the one that holds the results")
        unknown = [name for name in getattr(options, "names", ()) if name not in promised]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: unknown; the experiments are {', '.join(promised)}")
        complete()
        known = records.experiments()
        if options.command == "verdicts":
            return verdicts.write(known, options.out, options.readme)
        if options.command == "draw":
            return _draw_all([known[name] for name in options.names or known], options.out)
        if options.command == "all":
            return _run_all(known, options)
        return _run(known[options.command], options)
    except ValueError as error:
        top.error(str(error))


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
        except ValueError as error:
            outcomes[name], failed = f"FAILED: {error}", True
    print("\n".join(f"{name:14}{outcome}" for name, outcome in outcomes.items()))
    unfinished = options.minutes is None and any(outcome.startswith("unfinished") for outcome in outcomes.values())
    return 1 if failed else 130 if unfinished else 0


def _run(experiment: Experiment, options: argparse.Namespace) -> int:
    absent = records.missing(experiment)
    if absent:
        raise ValueError(f"{', '.join(absent)}: not installed; pip install -e '.[experiments]' brings what is needed")
    import torch

    from fngd.training.report import writable

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
    from experiments import tuning  # imports torch

    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ValueError(f"--optimizers {text!r} names none; choose from {', '.join(tuning.OPTIMISERS)}")
    for name in names:  # before any work
        tuning.optimiser(name)
    return names


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
