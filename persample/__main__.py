"""Commands: `python -m persample compare` and `python -m persample conformance`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from persample.compare import MODELS

    top = argparse.ArgumentParser(prog="python -m persample", description="Per-sample gradients, side by side.")
    commands = top.add_subparsers(dest="command", required=True)
    compare = commands.add_parser(
        "compare", help="every backend on one batch: exactness, time and memory as ratios to plain training"
    )
    compare.add_argument("--model", choices=list(MODELS), default="mlp")
    compare.add_argument("--batch", type=_positive, default=32, metavar="N", help="samples in the batch (32)")
    compare.add_argument("--out", type=Path, metavar="FILE.png", help="the chart (results/compare_MODEL.png)")
    compare.add_argument("--repeats", type=_positive, default=7, metavar="N", help="rounds of timing (7)")
    conformance = commands.add_parser(
        "conformance", help="every backend on every case of the table: exact, refused or wrong"
    )
    conformance.add_argument("--peers", action="store_true", help="other libraries too, where installed")
    conformance.add_argument("--out", type=Path, metavar="FILE.md", help="write the matrix as Markdown")
    conformance.add_argument("--cases", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    return top


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        import matplotlib
        import rich

        del matplotlib, rich
    except ImportError as error:
        print(f"this command needs {error.name}: pip install 'persample[demo]'", file=sys.stderr)
        return 2
    if options.command == "compare":
        from persample import compare

        compare.run(
            options.model, options.batch, options.out or Path(f"results/compare_{options.model}.png"), options.repeats
        )
        return 0
    from persample import conformance

    return conformance.run(peers=options.peers, out=options.out, containing=options.cases)


if __name__ == "__main__":
    sys.exit(main())
