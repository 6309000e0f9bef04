"""`python -m fngd compare`: trains with several optimisers, and goes on with a run that was interrupted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fngd.training import data, report
from fngd.training.loop import Comparison, Progress
from fngd.training.memory import measure
from fngd.training.options import FIGURE, RESULTS
from fngd.training.recipes import optimizer_spec
from fngd.training.settings import DEFAULTS, Config
from persample.testing.command_line import check_device, console, stop_flag

CHECKPOINT = "checkpoint.pt"


def run(parsed: argparse.Namespace) -> int:
    """Trains, measures, writes; returns 0, or 130 when interrupted. Raises ValueError on a mistake in the options."""
    options = vars(parsed)
    out, resume, memory = (options.pop(name) for name in ("out", "resume", "memory"))
    comparison = _resumed(out, options) if resume else Comparison(_config(options))
    config = comparison.config
    for name in config.optimizers:  # before any work; of a run to resume, which may have known others
        optimizer_spec(name)
    check_device(config.device)
    dataset = data.load(config.data, config.data_dir, train_size=config.train_size)
    data.say_if_larger(config.batch_size, dataset)
    report.writable(out)
    with stop_flag("after this batch") as stop, bars(comparison) as show:
        done = comparison.train(
            dataset, stop=lambda: bool(stop), report=show, save=lambda state: state.save(out / CHECKPOINT)
        )
    if done and memory:
        _weigh(comparison, dataset)
        comparison.save(out / CHECKPOINT)
    report.print_table(comparison)
    report.write_json(comparison, out / RESULTS)
    report.draw(comparison, out / FIGURE)
    print(f"wrote {out / RESULTS} and {out / FIGURE}")
    if not done:
        print(f"interrupted; to go on: python -m fngd compare --resume --out {out}")
        return 130
    return 0


def _weigh(comparison: Comparison, dataset: data.Dataset) -> None:
    config = comparison.config
    config = replace(config, batch_size=min(config.batch_size, len(dataset.train.labels)))
    for name in config.optimizers:
        if name not in comparison.memory:
            print(f"measuring the peak memory of {name} …", file=sys.stderr)
            comparison.memory[name] = measure(name, config, channels=dataset.channels, size=dataset.size)


def _config(options: dict[str, Any]) -> Config:
    defaults = DEFAULTS[options.get("data", Config().data)]
    return Config.from_json({**defaults, **options})


def _resumed(out: Path, options: dict[str, Any]) -> Comparison:
    path = out / CHECKPOINT
    if not path.is_file():
        raise ValueError(f"nothing to resume: looked for {path}. Give the --out of the interrupted run")
    comparison = Comparison.load(path)
    saved = comparison.config.to_json()
    given = Config.from_json({**saved, **options}).to_json()
    # A folder may have moved; anything else would make it another run.
    changed = [name for name in saved if saved[name] != given[name] and name not in ("data_dir", "device")]
    if changed:
        raise ValueError(
            "the interrupted run had "
            + ", ".join(f"--{name.replace('_', '-')} {saved[name]}" for name in changed)
            + "; leave these options out to resume it, or give another --out to start anew"
        )
    comparison.config = Config.from_json(given)
    return comparison


@contextmanager
def bars(comparison: Comparison) -> Iterator[Any]:
    """A function that takes `Progress` and shows it, on standard error."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    config = comparison.config
    total = len(config.seeds) * config.epochs
    index, epoch, _ = comparison.position
    columns = [
        TextColumn("{task.description:28}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    shown = console(stderr=True)
    # The losses have a line of their own: beside the bars they would leave these no room in 80 columns.
    bars, losses = Bars(*columns, console=shown), Text()
    with Live(Group(bars, losses), console=shown, refresh_per_second=10):
        whole = bars.add_task("epochs of all seeds", total=total, completed=index * config.epochs + epoch)
        inner = bars.add_task("batches", total=None)

        def show(progress: Progress) -> None:
            known = (f"{name} {loss:.3f}" for name, loss in progress.losses.items() if loss == loss)
            losses.plain = "  ".join(["loss:", *known])
            bars.update(
                inner,
                description=f"seed {progress.seed}, epoch {progress.epoch + 1}/{config.epochs}",
                completed=progress.batch + 1,
                total=progress.steps_per_epoch,
            )
            if progress.batch + 1 == progress.steps_per_epoch:
                bars.advance(whole)

        yield show
    if not shown.is_interactive:
        shown.print()  # into a file rich writes the last line without its end
