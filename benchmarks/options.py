"""The options of `python -m benchmarks`, and the names to choose from. Does without torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from persample.testing.command_line import whole
from persample.testing.start import add_version

COMMANDS = ("measure", "growth", "report", "check")
CLOCKS = ("wall", "process")

MODELS = {
    "mlp": "784-1024-1024-10, B 128",
    "resnet20": "ResNet-20 with GroupNorm, 3×32×32, B 128",
    "resnet18": "ResNet-18 with GroupNorm, 3×32×32, B 32",
    "transformer": "Transformer 4 × 256, T 32, B 32",
    "transformer_wide": "Transformer 2 × 768, T 128, B 8",
    "waves": "1-D convolutions, 2×1024, B 64",
    "words": "bag of words, table 30,000 × 64, T 64, B 64",
    "resnet20_bn": "ResNet-20 with BatchNorm, 3×32×32, B 128",
    "resnet18_bn": "ResNet-18 with BatchNorm, 3×32×32, B 32",
}
"""What `benchmarks.models` builds."""

WHATS = {
    "plain": "forward, backward, SGD with momentum",
    "stored": "FNGD step with stored coefficients",
    "coefficient": "FNGD step that computes coefficients",
    "ngd": "NGD step",
    "capture": "per_sample(...) alone",
    "grads": "per-sample gradients",
    "norms": "their norms",
    "gram": "their Gram matrix",
    "clipped_sum": "their clipped sum",
    "norms_step": "their norms, and the step with the clipped sum",
    "dot": "their inner products with 16 directions",
    "project": "256 random features of each",
    "sum_of_squares": "the sum of their squares, entry by entry",
    "jacobian": "the gradients of 10 outputs of 4 samples",
    "kernel": "the tangent kernel of these",
    "compiled": "the plain and the stored step under torch.compile; minutes to compile",
}


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """Returns the command line of one of `COMMANDS`."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks" + ("" if command == "measure" else f" {command}"),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="models:\n" + "".join(f"  {name:18}{text}\n" for name, text in MODELS.items())
        + "what:\n" + "".join(f"  {name:18}{text}\n" for name, text in WHATS.items()),
    )  # fmt: skip
    add_version(made, "benchmarks")
    add = made.add_argument
    if command in ("report", "check"):
        add("file", type=Path, metavar="FILE.json", help="what a measurement wrote")
        if command == "check":
            add("--clock", choices=CLOCKS, default="wall", help="wall time, or processor time (default wall)")
        return made
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
    return made


def _some(known: dict[str, Any]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}: choose from {', '.join(known)}")
        return names

    return parse
