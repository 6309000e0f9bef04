"""`python -m fngd compare` trains several optimisers on the same data; `inspect` shows what they see in one batch."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fngd.training import data, inspect_command, report
from fngd.training.loop import Comparison, Progress
from fngd.training.memory import measure
from fngd.training.models import MODELS
from fngd.training.recipes import DEFAULTS, OPTIMIZERS, SCHEDULES, Config
from persample.testing.command_line import check_device, stop_flag, whole

CHECKPOINT, RESULTS, FIGURE = "checkpoint.pt", "results.json", "figure.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 130 when interrupted. Exits with 2 on a mistake in the options."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    options = vars(parsed)
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        parser.error(f"{error.name} is not installed; it comes with the demo extra: pip install 'persample[demo]'")
    if options.get("data_dir") and options.get("data", Config().data) == "digits" and not options.get("resume"):
        parser.error(
            "--data-dir is given, but the digits come with scikit-learn; name the data set too: --data cifar10"
        )
    try:
        if options.pop("command") == "inspect":
            check_device(parsed.device)
            return inspect_command.run(parsed)
        out, resume, memory = (options.pop(name) for name in ("out", "resume", "memory"))
        comparison = _resumed(out, options) if resume else Comparison(_config(options))
        _check(comparison.config)
        config = comparison.config
        dataset = data.load(config.data, config.data_dir, train_size=config.train_size)
        report.writable(out)
        return _run(comparison, dataset, out, memory)
    except (ValueError, data.DataError) as error:
        parser.error(str(error))


def _run(comparison: Comparison, dataset: data.Dataset, out: Path, memory: bool) -> int:
    with stop_flag("after this batch") as stop, _bars(comparison) as show:
        done = comparison.train(
            dataset, stop=lambda: bool(stop), report=show, save=lambda state: state.save(out / CHECKPOINT)
        )
    if done and memory:
        for name in comparison.config.optimizers:
            if name not in comparison.memory:
                print(f"measuring the peak memory of {name} …", file=sys.stderr)
                comparison.memory[name] = measure(name, comparison.config, channels=dataset.channels, size=dataset.size)
        comparison.save(out / CHECKPOINT)
    report.print_table(comparison)
    report.write_json(comparison, out / RESULTS)
    report.draw(comparison, out / FIGURE)
    print(f"wrote {out / RESULTS} and {out / FIGURE}")
    if not done:
        print(f"interrupted; to go on: python -m fngd compare --resume --out {out}")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fngd", description="Natural-gradient optimisers, compared and inspected."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser(
        "compare",
        help="train with several optimisers; table, JSON and figure",
        description="Trains the same network with several optimisers on the same batches, in turns, and writes a "
        f"table, {RESULTS} and {FIGURE}. Ctrl-C stops after the current batch and keeps what there is.",
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="optimizers:\n" + "".join(f"  {name:14} {spec.help}\n" for name, spec in OPTIMIZERS.items())
        + "models:\n" + "".join(f"  {name:14} {spec.help}\n" for name, spec in MODELS.items()),
    )  # fmt: skip
    add, default = compare.add_argument, Config()
    add("--data", choices=list(data.DATASETS), help=f"data set (default {default.data})")
    add("--data-dir", metavar="DIR", help="folder of cifar-10-batches-py or FashionMNIST/raw; not for digits")
    add("--model", choices=list(MODELS), help="network (default cnn; resnet20 for cifar10)")
    add("--optimizers", type=_names, metavar="A,B,…", help=f"default {','.join(default.optimizers)}")
    add("--epochs", type=whole(), metavar="N", help=f"default {default.epochs}; 10 for the larger data sets")
    add("--batch-size", type=whole(), metavar="N", help=f"default {default.batch_size}; 128 for the larger data sets")
    add("--train-size", type=whole(), metavar="N", help="train on the first N images (default all)")
    add("--seeds", type=_seeds, metavar="0,1,…", help=f"default {','.join(map(str, default.seeds))}")
    add("--device", metavar="NAME", help="cpu (default), cuda, cuda:1, …")
    add("--lr", type=_rates, metavar="A=X,…", help="learning rates, as sgd=0.1,fngd=0.05 (default: see recipes.py)")
    add("--schedule", choices=list(SCHEDULES), help="of the learning rate (default step: × 0.1 at 50 %% and 75 %%)")
    add("--weight-decay", type=float, metavar="X", help=f"of all but AdamW (default {default.weight_decay})")
    add("--alpha", type=float, metavar="X", help=f"damping of ngd and fngd relative to ‖K‖_F (default {default.alpha})")
    add("--augment", action="store_true", help="random shifts by up to 4 pixels and horizontal flips")
    add("--out", type=Path, default=Path("results/compare"), metavar="DIR", help="where to write (default %(default)s)")
    add("--resume", action="store_true", default=False, help="go on with the interrupted run in --out")
    add("--no-memory", dest="memory", action="store_false", default=True, help="do not measure peak memory")
    inspect_command.add_parser(commands)
    return parser


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


def _check(config: Config) -> None:
    for name, known in (("optimizers", OPTIMIZERS), ("lr", OPTIMIZERS)):
        for entry in getattr(config, name):
            entry = entry if isinstance(entry, str) else entry[0]
            if entry not in known:
                raise ValueError(f"--{name}: {entry!r} is unknown; choose from {', '.join(known)}")
    for name, rate in config.lr:
        if not 0 <= rate < math.inf:
            raise ValueError(f"--lr {name}={rate}: a learning rate must be finite and at least 0, as {name}=0.1")
    if not 0 < config.alpha < math.inf:
        raise ValueError(
            f"--alpha {config.alpha}: it must be > 0 and finite; small values (1e-3) are far from SGD, 1 is nearly SGD"
        )
    if not 0 <= config.weight_decay < math.inf:
        raise ValueError(f"--weight-decay {config.weight_decay}: it must be at least 0 and finite; 5e-4 is usual")
    check_device(config.device)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"give at least one of {', '.join(OPTIMIZERS)}")
    return names


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(seed) for seed in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers with commas between, as 0,1,2") from None


def _rates(text: str) -> tuple[tuple[str, float], ...]:
    try:
        pairs = [entry.split("=") for entry in text.split(",")]
        return tuple((name.strip(), float(rate)) for name, rate in pairs)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give it as sgd=0.1,fngd=0.05") from None


@contextmanager
def _bars(comparison: Comparison) -> Iterator[Any]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    config = comparison.config
    total = len(config.seeds) * config.epochs
    index, epoch, _ = comparison.position
    columns = [
        TextColumn("{task.description:28}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    console = Console(stderr=True)
    # The losses have a line of their own: beside the bars they would leave these no room in 80 columns.
    bars, losses = Bars(*columns, console=console), Text()
    with Live(Group(bars, losses), console=console, refresh_per_second=10):
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


if __name__ == "__main__":
    sys.exit(main())
