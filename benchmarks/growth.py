"""How times grow with batch, width, positions and depth: `python -m benchmarks growth`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results, timing
from benchmarks.models import Problem
from benchmarks.report import plain_ticks
from benchmarks.results import Results
from benchmarks.variants import VARIANTS, Variant

KEYS = ("stored", "coefficient", "grads_out", "norms", "gram", "clipped_sum")
COLOURS = dict(zip(KEYS, ("#d62728", "#ff7f0e", "#7f7f7f", "#1f77b4", "#2ca02c", "#9467bd"), strict=True))
BASE = {"batch": 16, "time": 32, "width": 128, "depth": 2, "heads": 4, "words": 500}
AXES: dict[str, tuple[int, ...]] = {
    "batch": (4, 8, 16, 32, 64, 128),
    "width": (32, 64, 128, 256, 512),
    "time": (8, 16, 32, 64, 128),
    "depth": (1, 2, 4, 8),
}
NAMES = {"batch": "samples B", "width": "width", "time": "positions T", "depth": "layers"}


def variants() -> list[Variant]:
    """What is measured: ours, and the plain step."""
    return [VARIANTS["plain"], *(VARIANTS[key] for key in KEYS)]


def points(size: str) -> list[tuple[str, int]]:
    """(axis, value) of every measurement."""
    return [(axis, value) for axis, values in AXES.items() for value in (values if size == "full" else values[:2])]


def measure(found: Results, axis: str, value: int, *, device: str, size: str, repeats: int, seed: int) -> None:
    """Adds the times at one point, a Transformer that differs from the base in one size."""
    base = BASE if size == "full" else {}
    problem = Problem("transformer", size=size, device=device, changes={**base, axis: value})
    times = timing.measure(problem, variants(), repeats=repeats, seed=seed)
    found["models"][f"{axis}={value}"] = {
        "axis": axis, "value": value, "load_before": timing.load(),
        "variants": {key: vars(entry) for key, entry in times.items()},
    }  # fmt: skip


def draw(found: Results, path: Path) -> None:
    """Draws ratios to the plain step with quartiles, one panel for each axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, axis in zip(figure.subplots(2, 2, sharey=True).flat, AXES, strict=True):
        measured = sorted(
            (model for model in found["models"].values() if model["axis"] == axis), key=lambda model: model["value"]
        )
        for key in KEYS:
            line = [(model["value"], ratio) for model in measured if (ratio := results.ratio(model, key)) is not None]
            values, ratios = [value for value, _ in line], [ratio for _, ratio in line]
            panel.plot(values, [r.median for r in ratios], "o-", ms=3.5, color=COLOURS[key], label=VARIANTS[key].label)
            panel.fill_between(
                values, [r.low for r in ratios], [r.high for r in ratios], color=COLOURS[key], alpha=0.15, lw=0
            )
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(xlabel=NAMES[axis], xscale="log", yscale="log", xticks=[m["value"] for m in measured])
        panel.set_xticklabels([str(model["value"]) for model in measured])
        panel.minorticks_off()
        plain_ticks(panel)
        panel.spines[["top", "right"]].set_visible(False)
    panels: Sequence[Any] = figure.axes
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KEYS), frameon=False)
    for panel in panels[::2]:
        panel.set_ylabel("time ÷ plain step")
    base = ", ".join(f"{name} {size}" for name, size in BASE.items() if name in AXES)
    figure.suptitle(f"Transformer around {base}; medians and quartiles of paired ratios", fontsize=10)
    figure.savefig(path, dpi=150)
