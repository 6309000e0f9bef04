"""Tables and figure of `experiments.step_time`, beside the figures of the FNGD paper's Table III."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from experiments.record import Record, Result
from experiments.regions import REGIONS
from experiments.step_time_ratios import kinds, parts, ratio, results, shares

PAPER = {
    "resnet32": {"sgd": 1.0, "kfac": 1.71, "shampoo": 1.51, "eva": 1.83, "fngd": 1.23},
    "resnet110": {"sgd": 1.0, "kfac": 2.24, "shampoo": 1.92, "eva": 2.35, "fngd": 1.58},
    "resnet18": {"sgd": 1.0, "kfac": 2.79, "shampoo": 1.62, "eva": 1.75, "fngd": 1.36},
    "resnet34": {"sgd": 1.0, "kfac": 2.76, "shampoo": 1.56, "eva": 1.56, "fngd": 1.42},
}
"""Time of an epoch over that of SGD with momentum: Table III."""
CLOCKS = {"wall": "wall time", "process": "processor time"}


def report(record: Record) -> str:
    """Returns tables: averages beside the paper's, kinds of steps, parts."""
    found, epochs = results(record), record.settings["epochs"]
    processes, batches = (
        ", ".join(f"{model} {result[figure]}" for model, result in found.items()) for figure in ("processes", "batch")
    )
    lines = [
        f"# Time of a training step over SGD's (FNGD paper, Table III and Fig. 8), {record.scale} scale",
        f"{record.where()}. Median (quartiles) over the interleaved rounds of several processes ({processes}). KFAC "
        f"and Shampoo: statistics every 10 steps, inverses every 100; SKFAC: every 8; FNGD: one epoch in {epochs} "
        f"computes coefficients. Random data; batches {batches}. The paper: RTX 3060 Ti, batch 128, whole epochs.",
    ]
    for clock, words in CLOCKS.items():
        lines += [f"## Average step, {words}", _averages(record, found, clock)]
    lines += ["## Kinds of steps, wall time", _kinds(record, found)]
    lines += [
        "## Parts of an average step, in units of SGD's whole step",
        "statistics: Gram matrices, factors; solve: coefficients, inverses, roots; direction: preconditioning where it "
        "is not part of the backward pass.",
        _parts_table(record, found),
    ]
    return "\n\n".join(lines)


def _averages(record: Record, found: Mapping[str, Result], clock: str) -> str:
    rows = []
    for method in record.settings["methods"]:
        cells = []
        for model, result in found.items():
            own = ratio(result, method, record.settings["epochs"], clock=clock)
            paper = PAPER.get(model, {}).get(method)
            cells.append(f"{own or '–'}" + (f" [{paper:.2f}]" if paper and clock == "wall" else ""))
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    head = ["| [paper] | " + " | ".join(found) + " |", "| --- |" + " ---: |" * len(found)]
    return "\n".join(head + rows)


def _kinds(record: Record, found: Mapping[str, Result]) -> str:
    rows = ["| model | method | kind | share | ms | n | over SGD |", "| --- | --- | --- | ---: | ---: | ---: | ---: |"]
    epochs = record.settings["epochs"]
    for model, result in found.items():
        for method in record.settings["methods"]:
            for kind in kinds(result, method):
                wall = result["times"][f"{method}/{kind}"]["wall"]
                rows.append(
                    f"| {model} | {method} | {kind} | {shares(method, epochs)[kind]:.3f} | "
                    f"{1000 * statistics.median(wall):.1f} | {len(wall)} | {ratio(result, method, epochs, kind=kind)} |"
                )
    return "\n".join(rows)


def _parts_table(record: Record, found: Mapping[str, Result]) -> str:
    rows = ["| model | method | " + " | ".join(REGIONS) + " |", "| --- | --- |" + " ---: |" * len(REGIONS)]
    for model, result in found.items():
        whole = sum(parts(result, "sgd", 1).values())
        for method in record.settings["methods"]:
            own = parts(result, method, record.settings["epochs"])
            if own and whole:
                rows.append(f"| {model} | {method} | " + " | ".join(f"{own[r] / whole:.3f}" for r in REGIONS) + " |")
    return "\n".join(rows)


COLOURS = dict(zip(REGIONS, ("#4c78a8", "#9ecae9", "#54a24b", "#e45756", "#f2b447", "#b0b0b0"), strict=True))


def draw(record: Record, stem: Path) -> list[Path]:
    """Stacked parts of an average step for each model, with measured totals and the paper's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = results(record)
    methods, epochs = record.settings["methods"], record.settings["epochs"]
    figure = Figure(figsize=(max(3.1 * len(models) + 1.2, 7.4), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axis, (model, result) in zip(axes, models.items(), strict=True):
        whole = sum(parts(result, "sgd", 1).values()) or 1.0
        top = 0.0
        for place, method in enumerate(methods):
            own, left = parts(result, method, epochs), 0.0
            for region in REGIONS if own else ():
                axis.barh(place, own[region] / whole, left=left, color=COLOURS[region], height=0.72)
                left += own[region] / whole
            found, paper = ratio(result, method, epochs), PAPER.get(model, {}).get(method)
            edge = max(left, paper or 0.0, found.high if found else 0.0)
            if paper:
                axis.plot(paper, place, "D", mfc="none", mec="#6a3d9a", ms=6)
            if found is not None:
                error = [[found.median - found.low], [found.high - found.median]]
                axis.errorbar(found.median, place, xerr=error, fmt="o", color="black", ms=3.5, capsize=2, lw=1)
                axis.annotate(f"{found.median:.2f}", (edge, place), (6, 0), textcoords="offset points", va="center",
                              fontsize=8)  # fmt: skip
            top = max(top, edge)
        axis.set(title=f"{model}, batch {result['batch']}", xlabel="time / SGD", xlim=(0, 1.16 * top))
        axis.set_yticks(range(len(methods)), methods)
        axis.axvline(1, color="black", lw=0.6, ls=":")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3, lw=0.6)
    axes[0].invert_yaxis()
    handles = [axes[0].barh([0], [0], color=COLOURS[region], label=region) for region in REGIONS]
    handles += axes[0].plot([], [], "o", color="black", ms=3.5, label="whole step, median (number) and quartiles")
    handles += axes[0].plot([], [], "D", mfc="none", mec="#6a3d9a", label="paper, Table III")
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * len(models)), frameon=False, fontsize=8
    )
    figure.suptitle(f"Average training step over SGD's; {record.where()}", fontsize=10)
    path = stem.with_suffix(".png")
    figure.savefig(path, dpi=150)
    return [path]
