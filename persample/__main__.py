"""Commands: `python -m persample compare` and `python -m persample conformance`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from persample.testing.command_line import whole


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from persample.testing.compare import MODELS

    top = argparse.ArgumentParser(prog="python -m persample", description="Per-sample gradients, side by side.")
    commands = top.add_subparsers(dest="command", required=True)
    compare = commands.add_parser(
        "compare", help="every backend on one batch: exactness, time and memory as ratios to plain training"
    )
    compare.add_argument("--model", choices=list(MODELS), default="mlp")
    compare.add_argument("--batch", type=whole(), default=32, metavar="N", help="samples in the batch (32)")
    compare.add_argument("--out", type=Path, metavar="FILE.png", help="the chart (results/compare_MODEL.png)")
    compare.add_argument("--repeats", type=whole(), default=7, metavar="N", help="rounds of timing (7)")
    conformance = commands.add_parser(
        "conformance", help="every backend on every case of the table: exact, refused or wrong"
    )
    conformance.add_argument("--peers", action="store_true", help="other libraries too, where installed")
    conformance.add_argument("--out", type=Path, metavar="FILE.md", help="write the matrix as Markdown")
    conformance.add_argument("--cases", default="", metavar="TEXT", help="only cases whose name contains TEXT")
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        import matplotlib.backend_bases
        import rich  # noqa: F401
    except ImportError as error:
        print(f"this command needs {error.name}: pip install 'persample[demo]'", file=sys.stderr)
        return 2
    out = options.out
    if options.command == "compare":
        out = out or Path(f"results/compare_{options.model}.png")
    try:
        if out is not None:
            pictures = matplotlib.backend_bases.FigureCanvasBase.get_supported_filetypes()
            _refuse_unwritable(out, sorted(pictures) if options.command == "compare" else ())
    except ValueError as error:
        print(f"python -m persample {options.command}: {error}", file=sys.stderr)
        return 2
    if options.command == "compare":
        from persample.testing import compare

        compare.run(options.model, options.batch, out, options.repeats)
        return 0
    from persample.testing import conformance

    return conformance.run(peers=options.peers, out=options.out, containing=options.cases)


if __name__ == "__main__":
    sys.exit(main())
