"""The results of a comparison: a table, JSON and a figure."""

from __future__ import annotations

import json
import math
import platform
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fngd.training.conclusion import conclude
from fngd.training.loop import Comparison
from persample.testing.command_line import console

COLOURS = {"sgd": "#7f7f7f", "adamw": "#1f77b4", "ngd": "#2ca02c", "fngd": "#d62728"}
SPARE_COLOURS = ("#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")


def writable(folder: Path) -> None:
    """Makes the folder; raises `ValueError` where nothing can be written in it, before a run instead of after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"--out {folder}: no file can be written there ({error.strerror}); give another folder"
        ) from error


def reference(comparison: Comparison) -> str:
    """The optimiser to which times are compared: SGD, or the first one where SGD does not run."""
    names = comparison.config.optimizers
    return "sgd" if "sgd" in names else names[0]


def summarise(comparison: Comparison) -> list[dict[str, Any]]:
    """Returns for each optimiser: mean and spread of the last finished epoch over seeds, and time ratios.

    A time ratio is Σ seconds / Σ seconds of the reference over the same batches: of the first epochs, in
    which FNGD computes its coefficients, of the later ones, and of all. Spreads are standard deviations
    over seeds.
    """
    rows = []
    base = comparison.history.get(reference(comparison), {})
    for name in comparison.config.optimizers:
        runs = {seed: epochs for seed, epochs in comparison.history.get(name, {}).items() if epochs}
        accuracies = [epochs[-1]["test_accuracy"] for epochs in runs.values()]
        losses = [epochs[-1]["train_loss"] for epochs in runs.values()]
        pairs = [
            (own["seconds"], other["seconds"], epoch)
            for seed, epochs in runs.items()
            for epoch, (own, other) in enumerate(zip(epochs, base.get(seed, []), strict=False))
        ]
        rows.append(
            {
                "optimizer": name,
                "seeds": len(runs),
                "epochs": min((len(epochs) for epochs in runs.values()), default=0),
                "train_loss": _mean(losses),
                "train_loss_std": _std(losses),
                "test_accuracy": _mean(accuracies),
                "test_accuracy_std": _std(accuracies),
                "test_accuracy_min": min(accuracies, default=math.nan),
                "seconds_per_epoch": _mean([own for own, _, _ in pairs]),
                "time_ratio": _ratio(pairs),
                "time_ratio_first_epoch": _ratio([pair for pair in pairs if pair[2] == 0]),
                "time_ratio_later_epochs": _ratio([pair for pair in pairs if pair[2] > 0]),
                "peak_memory_mib": comparison.memory.get(name),
            }
        )
    return rows


def print_table(comparison: Comparison) -> None:
    """Prints the summary as a table."""
    from rich import box
    from rich.table import Table

    config, base = comparison.config, reference(comparison)
    rows = summarise(comparison)
    seeds, last = max(row["seeds"] for row in rows), min(row["epochs"] for row in rows)
    table = Table(
        title=f"{config.data}, {config.model}, batch {config.batch_size}, {config.epochs} epochs, "
        f"{seeds} seed{'s' if seeds != 1 else ''}",
        caption=("" if comparison.finished else f"UNFINISHED: the last seed has {last} epochs. ")
        + f"± standard deviation over seeds. Time: training alone, interleaved with {base} batch by batch."
        + (" Memory: peak above the start, in a process of its own." if comparison.memory else ""),
        box=box.SIMPLE_HEAD,
    )
    table.add_column("\noptimizer", no_wrap=True)
    # Two lines a heading and no × or ± more than needed, so that the table fits into 80 columns.
    headings = ("train\nloss", "test\naccuracy, %", f"time /\n{base}", "first\nepoch", "later\nepochs", "memory\nMiB")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        memory = row["peak_memory_mib"]
        table.add_row(
            row["optimizer"].replace(":", ":\n"),
            _spread(row["train_loss"], math.nan, 4),
            _spread(row["test_accuracy"], row["test_accuracy_std"], 2),
            _times(row["time_ratio"]),
            _times(row["time_ratio_first_epoch"]),
            _times(row["time_ratio_later_epochs"]),
            "–" if memory is None else f"{memory:.0f}",
        )
    console().print(table)
    console().print(conclude(comparison, base), markup=False, highlight=False)


def write_json(comparison: Comparison, path: Path) -> None:
    """Writes settings, environment, summary and every epoch's figures."""
    content = {
        "config": comparison.config.to_json(),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "finished": comparison.finished,
        "summary": _json(summarise(comparison)),
        "conclusion": conclude(comparison, reference(comparison)),
        "history": _json(comparison.history),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def draw(comparison: Comparison, path: Path) -> None:
    """Draws training loss and test accuracy against epoch and time: mean over seeds, band of their range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    config = comparison.config
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    spare = iter(SPARE_COLOURS * len(config.optimizers))
    for name in config.optimizers:
        runs = [epochs for epochs in comparison.history.get(name, {}).values() if epochs]
        if not runs:
            continue
        length = min(len(epochs) for epochs in runs)
        colour = COLOURS.get(name) or next(spare)
        ends = [
            statistics.fmean(sum(entry["seconds"] for entry in epochs[: count + 1]) for epochs in runs)
            for count in range(length)
        ]
        for row, key in enumerate(("train_loss", "test_accuracy")):
            values = [[epochs[count][key] for epochs in runs] for count in range(length)]
            means = [_mean(entries) for entries in values]
            for column, x in enumerate((range(1, length + 1), ends)):
                axis = axes[row, column]
                marker = "o" if length < 4 else None
                axis.plot(x, means, color=colour, label=name, linewidth=1.6, marker=marker, markersize=4)
                axis.fill_between(x, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, lw=0)
    axes[0, 0].set(ylabel="training loss", yscale="log")
    axes[1, 0].set(ylabel="test accuracy, %", xlabel="epoch")
    axes[1, 1].set(xlabel="training time, s")
    _zoom(axes[1, 0], [e["test_accuracy"] for runs in comparison.history.values() for r in runs.values() for e in r])
    axes[1, 0].xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat:
        axis.grid(alpha=0.3, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    if axes[0, 0].get_legend_handles_labels()[0]:
        axes[0, 0].legend(frameon=False)
    seeds = max((len(runs) for runs in comparison.history.values()), default=0)
    size = "" if config.train_size is None else f", {config.train_size} training images"
    figure.suptitle(f"{config.model} on {config.data}{size}; {seeds} seed{'s' if seeds != 1 else ''}, mean and range")
    figure.savefig(path, dpi=150)


def _zoom(axis: Any, accuracies: Sequence[float]) -> None:
    """Cuts off poor first epochs, which would squeeze the differences that matter."""
    finite = sorted(value for value in accuracies if math.isfinite(value))
    if len(finite) > 1 and finite[-1] > finite[0]:
        low = max(finite[0], finite[-1] - 3 * (finite[-1] - finite[len(finite) // 4]))
        margin = 0.05 * (finite[-1] - low) or 1
        axis.set_ylim(low - margin, min(100.0, finite[-1]) + margin)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def _spread(mean: float, std: float, digits: int) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f" ± {std:.{digits}f}")


def _ratio(pairs: Sequence[tuple[float, float, int]]) -> float:
    return sum(own for own, _, _ in pairs) / sum(other for _, other, _ in pairs) if pairs else math.nan


def _times(ratio: float) -> str:
    return "–" if math.isnan(ratio) else f"{ratio:.2f}"


def _json(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, become null."""
    if isinstance(value, dict):
        return {str(key): _json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
