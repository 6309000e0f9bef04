"""Training curves of several methods: figures by epoch and by training time, mean over seeds and their range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.record import Record
from experiments.runs import spent
from experiments.statistics import mean

COLOURS = {
    "sgd": "#7f7f7f", "sgd-long": "#000000", "adamw": "#1f77b4", "adamw-warmup": "#0b3c6f", "kfac": "#ff7f0e",
    "shampoo": "#8c564b", "eva": "#17becf", "skfac": "#e377c2", "ngd": "#2ca02c", "fngd": "#d62728",
    "fngd-warmup": "#8b0000", "fngd-per-layer": "#9467bd",
}  # fmt: skip
VARIANTS = ("-long", "-warmup", "-per-layer")


def draw_curves(
    path: Path,
    found: Mapping[str, Sequence[list[dict[str, Any]]]],
    figures: Mapping[str, str],
    title: str,
    record: Record,
) -> Path:
    """Draws a figure by epoch (left) and seconds (right), below each other; returns the path.

    Arguments:
        found: for each method the epochs of its runs.
        figures: which figures of an epoch, and how their axes are called; the first one is drawn logarithmically.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(figures), 2, sharey="row", sharex="col")
    for method, runs in found.items():
        if not runs:
            continue
        length = min(map(len, runs))
        seconds = [mean([spent(epochs, end) or 0.0 for epochs in runs]) for end in range(1, length + 1)]
        colour, dashes = COLOURS.get(method, "#bcbd22"), "--" if method.endswith(VARIANTS) else "-"
        for row, key in enumerate(figures):
            values = [[epochs[count][key] for epochs in runs] for count in range(length)]
            means, low, high = ([f(v) for v in values] for f in (mean, min, max))
            for column, x in enumerate((range(1, length + 1), seconds)):
                width = 2.2 if method == "fngd" else 1.3
                axes[row, column].plot(x, means, dashes, color=colour, lw=width, label=method, marker="o", ms=2.5)
                axes[row, column].fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    for row, label in enumerate(figures.values()):
        axes[row, 0].set(ylabel=label)
    axes[0, 0].set(yscale="log")
    axes[-1, 0].set(xlabel="epoch")
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    axes[-1, 1].set(xlabel="training time, CPU seconds" if record.device == "cpu" else "training time, s")
    for axis in axes.flat:
        axis.grid(alpha=0.3, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    seeds = max(map(len, found.values()))
    how = "one seed" if seeds == 1 else f"mean and range of {seeds} seeds"
    figure.suptitle(f"{title}, {record.scale} scale: {how}")
    figure.savefig(path, dpi=130)
    return path
