"""Commands: `python -m persample compare`, `conformance` and `report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from persample.testing.command_line import whole
from persample.testing.start import add_version, check_installed, complete

MODELS = ("mlp", "cnn", "transformer")
"""What `compare` builds, `persample.testing.compare.MODELS`; here, so that options can be read without torch."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m persample", description="Per-sample gradients, side by side.")
    add_version(top, "persample")
    commands = top.add_subparsers(dest="command", required=True)
    compare = commands.add_parser(
        "compare", help="every backend on one batch: exactness, time and memory as ratios to plain training"
    )
    compare.add_argument("--model", choices=MODELS, default="mlp")
    compare.add_argument("--batch", type=whole(), default=32, metavar="N", help="samples in the batch (32)")
    compare.add_argument("--out", type=Path, metavar="FILE.png", help="the chart (results/compare_MODEL.png)")
    compare.add_argument("--repeats", type=whole(), default=7, metavar="N", help="rounds of timing (7)")
    conformance = commands.add_parser(
        "conformance", help="every backend on every case of the table: exact, refused or wrong"
    )
    conformance.add_argument("--peers", action="store_true", help="other libraries too, where installed")
    conformance.add_argument("--out", type=Path, metavar="FILE.md", help="write the matrix as Markdown")
    conformance.add_argument(
        "--totals", type=Path, metavar="PAGE.md", help="write the totals between the marks that the page has for them"
    )
    conformance.add_argument("--cases", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    report = commands.add_parser(
        "report",
        help="what a report of a problem needs: versions, machine, and a model that is refused or wrong",
        description="Prints as Markdown what a report of a problem needs: versions, and the machine without its name, "
        "paths or users. With a FILE also the layers of its model, by path, type and shape, without values, and what "
        "each backend answers. Look through it before you send it.",
    )
    report.add_argument(
        "file", nargs="?", type=Path, metavar="FILE.py",
        help="Python that sets model and, to try the backends, loss_fn, inputs and targets; it is run",
    )  # fmt: skip
    return top


def _refuse_unwritable(out: Path, formats: Collection[str]) -> None:
    """Raises `ValueError` where nothing could be written in the end: said before minutes are spent on measuring."""
    if formats and out.suffix.removeprefix(".").lower() not in formats:
        raise ValueError(f"--out {out}: the name must end in one of {', '.join(f'.{name}' for name in formats)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        new = not out.exists()
        with out.open("ab"):
            pass
        if new:
            out.unlink()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror}); give a file in another folder") from error


def _compare(options: argparse.Namespace) -> int:
    check_installed("rich", "matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    out = options.out or Path(f"results/compare_{options.model}.png")
    _refuse_unwritable(out, sorted(FigureCanvasBase.get_supported_filetypes()))
    complete()
    from persample.testing import compare

    compare.run(options.model, options.batch, out, options.repeats)
    return 0


def _conformance(options: argparse.Namespace) -> int:
    check_installed("rich")
    for path in (options.out, options.totals):
        if path is not None:
            _refuse_unwritable(path, ())
    complete()
    from persample.testing import conformance

    return conformance.run(peers=options.peers, out=options.out, containing=options.cases, page=options.totals)


def _report(options: argparse.Namespace) -> int:
    complete()
    from persample.testing import report

    print(report.text(options.file))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "compare": _compare,
    "conformance": _conformance,
    "report": _report,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except ValueError as error:
        print(f"python -m persample {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
