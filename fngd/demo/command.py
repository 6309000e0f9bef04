"""`python -m fngd demo`: measures, prints one table and three sentences, writes one figure and one JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fngd.demo import conclusions, figure
from fngd.demo.cost import BATCH, Cost, costs
from fngd.demo.race import OPTIONS, RATE, SIZE, Curve, race
from fngd.demo.verdicts import Verdict, source, verdicts
from fngd.training.options import DEMO_FIGURE, DEMO_RESULTS
from fngd.training.report import writable
from persample.testing.command_line import console
from persample.testing.machine import environment


def run(parsed: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError where nothing can be written."""
    out: Path = parsed.out
    writable(out)
    start = time.monotonic()
    with _one_thread():
        found = verdicts(progress=_told("verdicts on"))
        ratios = costs(progress=_told("time of"))
        curves = race(parsed.seconds, progress=_told("Poisson equation by"))
    words = (conclusions.of_verdicts(found), conclusions.of_costs(ratios), conclusions.of_race(curves))
    _print(found, ratios, curves, words)
    figure.draw(found, ratios, curves, words, out / DEMO_FIGURE)
    _write(found, ratios, curves, words, out / DEMO_RESULTS)
    print(f"wrote {out / DEMO_RESULTS} and {out / DEMO_FIGURE}, in {time.monotonic() - start:.0f} s")
    return 0


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a machine that others use, threads that wait for each other are what is measured otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _told(what: str) -> Any:
    return lambda name: print(f"{what} {name} …", file=sys.stderr)


def _print(found: Sequence[Verdict], ratios: Sequence[Cost], curves: Sequence[Curve], words: Sequence[str]) -> None:
    shown, note = console(), source(found)
    styles = {"exact": "green", "refused": "dim", "wrong": "bold red", "crash": "bold magenta"}
    models = dict.fromkeys(v.model for v in found)
    _section(
        shown,
        ["every sample's gradient", *dict.fromkeys(v.library for v in found)],
        [
            [model, *((v.verdict + ("" if v.live else "*"), styles[v.verdict]) for v in found if v.model == model)]
            for model in models
        ],
    )
    shown.print(*([f"* {note}"] if note else []), words[0], sep="\n")
    _section(
        shown,
        ["time / plain step", *ratios[0].ratios],
        [[f"{c.model}, {c.plain_ms:.1f} ms", *(f"{r.median:.1f}" for r in c.ratios.values())] for c in ratios],
    )
    shown.print(words[1])
    _section(
        shown,
        ["Poisson equation", "error", "seconds", "steps"],
        [[c.method, f"{c.error[-1]:.1e}", f"{c.seconds[-1]:.1f}", str(c.steps[-1])] for c in curves],
    )
    shown.print(words[2])


def _section(shown: Any, headings: Sequence[str], rows: Sequence[Sequence[str | tuple[str, str]]]) -> None:
    """Prints a part of the table; a cell is its text, or that and its style."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True, min_width=0 if place else 23)
    for row in rows:
        table.add_row(*(Text(*((cell,) if isinstance(cell, str) else cell)) for cell in row))
    shown.print(table)


def _write(
    found: Sequence[Verdict], ratios: Sequence[Cost], curves: Sequence[Curve], words: Sequence[str], path: Path
) -> None:
    content = {
        "environment": {
            **environment("cpu", ("torch", "numpy", "opacus", "backpack-for-pytorch", "torchjd")),
            "threads": 1,
        },
        "conclusions": dict(zip(("verdicts", "cost", "poisson"), words, strict=True)),
        "verdicts": [asdict(verdict) for verdict in found],
        "verdicts_recorded": source(found),
        "cost": {"batch": BATCH, "models": [asdict(cost) for cost in ratios]},
        "poisson": {**SIZE, "gauss_newton": OPTIONS, "adam_lr": RATE, "curves": [asdict(curve) for curve in curves]},
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
