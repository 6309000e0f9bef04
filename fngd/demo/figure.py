"""The figure of the demo: three panels, under each what follows from it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fngd.demo.cost import BATCH, LOOP, Cost
from fngd.demo.race import Curve
from fngd.demo.verdicts import Verdict, recorded

SHOWN = {"exact": ("✓ exact", "#d8ecd9", "#14521c"), "refused": ("refused", "#ececec", "#444444"),
         "wrong": ("✗ wrong", "#f6c9c4", "#8c1007"), "crash": ("crash", "#f6c9c4", "#8c1007")}  # fmt: skip
"""Verdict -> words, background, colour of the words."""
TITLES = ("Who has every sample's gradient right?", "What does it cost?", "What is it good for?")
BARS = ("#4477aa", "#228833", "#ccbb44")
LINES = ("#c0392b", "#4477aa", "#777777")


def draw(
    verdicts: Sequence[Verdict], costs: Sequence[Cost], curves: Sequence[Curve], words: Sequence[str], path: Path
) -> None:
    """Writes the figure; `words` are the three conclusions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16.5, 6))
    FigureCanvasAgg(figure)
    spaces = {"wspace": 0.24, "left": 0.115, "right": 0.985, "top": 0.86, "bottom": 0.31}
    panels = figure.subplots(1, 3, gridspec_kw={"width_ratios": (1.2, 1, 1), **spaces})
    _verdicts(panels[0], verdicts)
    _costs(panels[1], costs)
    _race(panels[2], curves)
    for axis, title, text in zip(panels, TITLES, words, strict=True):
        box = axis.get_position()
        figure.text(box.x0, 0.93, title, fontsize=14, weight="bold")
        lines = textwrap.fill(text, int(200 * box.width))  # letters that a panel of that share has room for
        figure.text(box.x0, 0.165, lines, fontsize=11.5, va="top", linespacing=1.4)
    figure.savefig(path, dpi=130)


def _verdicts(axis: Any, found: Sequence[Verdict]) -> None:
    models = list(dict.fromkeys(v.model for v in found))
    libraries = list(dict.fromkeys(v.library for v in found))
    for verdict in found:
        x, y = libraries.index(verdict.library), models.index(verdict.model)
        text, ground, colour = SHOWN[verdict.verdict]
        axis.add_patch(_rectangle(x, y, ground))
        axis.text(x, y, text + ("" if verdict.live else "*"), ha="center", va="center", color=colour, fontsize=11.5)
    axis.set(xlim=(-0.5, len(libraries) - 0.5), ylim=(len(models) - 0.5, -0.5))
    axis.set_xticks(range(len(libraries)), libraries, fontsize=12)
    axis.set_yticks(range(len(models)), models, fontsize=12)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    if not all(v.live for v in found):
        axis.set_xlabel(f"* not installed here: as recorded on {recorded()['date']}", fontsize=11.5, labelpad=8)


def _rectangle(x: int, y: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, facecolor=colour)


def _costs(axis: Any, found: Sequence[Cost]) -> None:
    calls = [call for call in found[0].ratios if call != LOOP]
    for k, call in enumerate(calls):
        places = [n + (k - (len(calls) - 1) / 2) * 0.27 for n in range(len(found))]
        heights = [cost.ratios[call].median for cost in found]
        bars = axis.bar(places, heights, 0.25, label=call, color=BARS[k])
        axis.bar_label(bars, [f"{height:.1f}" for height in heights], padding=2, fontsize=10.5)
    axis.axhline(1, color="black", linewidth=1.2, linestyle="--", label="a plain training step")
    axis.set_xticks(range(len(found)), [f"{cost.model}\n{cost.plain_ms:.1f} ms" for cost in found], fontsize=11)
    axis.set_xlabel(f"time of a plain step on {BATCH} digits", fontsize=11.5)
    axis.set_ylabel("time / plain training step", fontsize=11.5)
    axis.margins(y=0.3)
    axis.legend(frameon=False, fontsize=10.5, ncols=2, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)


def _race(axis: Any, curves: Sequence[Curve]) -> None:
    for curve, colour in zip(curves, LINES, strict=True):
        axis.plot(curve.seconds, curve.error, color=colour, linewidth=2)
        axis.annotate(
            curve.method, (curve.seconds[-1], curve.error[-1]), xytext=(-4, 7), textcoords="offset points",
            color=colour, fontsize=12, ha="right",
        )  # fmt: skip
    axis.set_yscale("log")
    axis.set_xlabel("seconds of the processor", fontsize=11.5)
    axis.set_ylabel("error of a Poisson equation's solution", fontsize=11.5)
    axis.grid(alpha=0.3, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
