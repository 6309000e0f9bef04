"""Results as tables, for the terminal and in Markdown, and as a figure."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.results import Results
from benchmarks.variants import OURS, STEPS, VARIANTS, Variant
from persample.testing.command_line import console

COLOURS = {
    OURS: "#d62728", "Opacus hooks": "#1f77b4", "Opacus ghost": "#17becf", "vmap(grad)": "#7f7f7f",
    "ExpandedWeights": "#bcbd22", "BackPACK": "#2ca02c", "TorchJD": "#9467bd",
}  # fmt: skip
HEADINGS = ("", "ms", "× plain", "quartiles", "processor × plain", "× limit", "memory × plain", "later", "MiB")


def rows(model: Mapping[str, Any]) -> Iterator[tuple[Variant, list[str]]]:
    """Returns the cells of each variant that was tried, in the order of `VARIANTS`."""
    for key, variant in VARIANTS.items():
        entry = model["variants"].get(key)
        if entry is None:
            continue
        time = results.ratio(model, key, variant.reference)
        if time is None:
            yield variant, [variant.label, entry["status"]]
            continue
        process = results.ratio(model, key, variant.reference, clock="process")
        limit = results.ratio(model, key, plus=variant.limit) if variant.limit else None
        memory, peak = results.memory_ratio(model, key), entry.get("memory")
        later = results.memory_ratio(model, key, when="memory_later")
        yield (
            variant,
            [
                variant.label,
                f"{1000 * (results.seconds(model, key) or 0):.1f}",
                f"{time.median:.2f}",
                f"{time.low:.2f}–{time.high:.2f}",
                "" if process is None else f"{process.median:.2f}",
                "" if limit is None else f"{limit.median:.2f}",
                "" if memory is None else f"{memory:.2f}",
                "" if later is None else f"{later:.2f}",
                "" if peak is None else f"{peak / 2**20:.0f}",
            ],
        )


def print_model(name: str, model: Mapping[str, Any]) -> None:
    """Prints the table of one model."""
    from rich import box
    from rich.table import Table

    # Without a terminal rich assumes 80 columns, in which the headings do not fit.
    shown = console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=caption(name, model), box=box.SIMPLE_HEAD, title_justify="left")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
    refused = []
    for variant, cells in rows(model):
        if len(cells) == len(HEADINGS):
            table.add_row(*cells, style="bold" if variant.library == OURS else None)
        else:
            refused.append(f"  {cells[0]}: {cells[1]}")
    shown.print(table)
    shown.print("\n".join(refused), soft_wrap=True)


def caption(name: str, model: Mapping[str, Any]) -> str:
    """What was measured, and how busy the machine was."""
    speed = model["fill"]
    text = f"{name}: {model['help']}; {model['grads_bytes'] / 1e6:.0f} MB of gradients"
    text += f"; memory is written at {speed['touched']:.1f} GB/s, fresh memory at {speed['fresh']:.1f} GB/s"
    return text if model["load_before"] is None else f"{text}; load before {model['load_before']:.1f}"


def conditions(found: Results) -> str:
    """A sentence on machine, versions and settings."""
    about, settings = found["environment"], found["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    device = about.get("gpu") or f"{about['processor']}, {settings['threads']} threads of {about['cores']} cores"
    several = f" in each of {settings['processes']} processes" if settings.get("processes", 1) > 1 else ""
    return (
        f"{device}; Python {about['python']}, {versions}; {settings['repeats']} interleaved repetitions{several}, "
        f"order drawn with seed {settings['seed']}."
    )


def overview(found: Results, *, peers: bool = True) -> str:
    """Returns the Markdown table of medians, variants by models."""
    models = found["models"]
    lines = [
        "| time ÷ plain step | " + " | ".join(models) + " |",
        "| --- |" + " ---: |" * len(models),
    ]
    for key, variant in VARIANTS.items():
        if key == "plain" or (not peers and variant.library != OURS):
            continue
        entries = [model["variants"].get(key) for model in models.values()]
        if any(entry is not None for entry in entries):
            cells = [_short(model, key, variant.reference) for model in models.values()]
            label = f"**{variant.label}**" if variant.library == OURS else variant.label
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(model: Mapping[str, Any], key: str, reference: str) -> str:
    entry = model["variants"].get(key)
    if entry is None:
        return ""
    time = results.ratio(model, key, reference)
    return entry["status"].partition(":")[0] if time is None else f"{time.median:.2f}"


def title(found: Results) -> str:
    """Returns what was measured, in words that tell the reports from each other."""
    keys = {key for model in found["models"].values() for key in model["variants"]}
    variants = [VARIANTS[key] for key in keys if key in VARIANTS]
    if any(variant.library != OURS for variant in variants):
        return "Beside other libraries"
    if any(variant.what == "compiled" for variant in variants):
        return "Compiled steps"
    return "Steps and quantities" if any(variant.what not in STEPS for variant in variants) else "Training steps"


def markdown(found: Results, figure: str | None = None) -> str:
    """Returns the whole report."""
    parts = [
        f"# {title(found)}: {', '.join(found['models'])}",
        "Medians of ratios to the plain step (forward, backward, SGD with momentum) of the same round. × limit: to "
        "the plain step plus writing as many bytes. Memory: growth of the peak over model and batch, in a process "
        "of its own, in the first calls and in a later one. Refused: the library raised. Wrong: its result differs "
        "from ours by more than 1 %. Ours are in "
        "bold.",
        conditions(found),
        overview(found),
    ]
    if figure is not None:
        parts.append(f"![time of each quantity, as a multiple of the plain step]({figure})")
    for name, model in found["models"].items():
        parts += [f"## {name}: {title(found).lower()}", f"{caption(name, model)}; {model['date']}."]
        lines = ["| " + " | ".join(HEADINGS) + " |", "| --- |" + " ---: |" * (len(HEADINGS) - 1)]
        for variant, cells in rows(model):
            cells = [_escaped(cell) for cell in cells] + [""] * (len(HEADINGS) - len(cells))
            cells[0] = f"**{cells[0]}**" if variant.library == OURS else cells[0]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def draw(found: Results, path: Path) -> None:
    """Draws, for every model and quantity, the time of each library as a multiple of the plain step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    models = found["models"]
    across = min(3, max(1, len(models)))
    down = -(-max(1, len(models)) // across)
    figure = Figure(figsize=(4.6 * across, 3.2 * down + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False)
    used: dict[str, None] = {}
    for axis, (name, model) in zip(axes.flat, models.items(), strict=False):
        used |= dict.fromkeys(_panel(axis, name, model))
    for axis in axes.flat[len(models) :]:
        axis.set_visible(False)
    figure.legend(
        handles=[Patch(color=COLOURS[library], label=library) for library in COLOURS if library in used],
        loc="outside lower center", ncols=7, frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=150)


def _panel(axis: Any, name: str, model: Mapping[str, Any]) -> list[str]:
    bars = []
    for key, variant in VARIANTS.items():
        time = results.ratio(model, key, variant.reference)
        if time is not None and variant.what not in ("plain", "compiled") and not key.startswith("write"):
            bars.append((variant, time))
    groups = list(dict.fromkeys(variant.what for variant, _ in bars))
    position, ticks = 0.0, []
    for what in groups:
        members = [bar for bar in bars if bar[0].what == what]
        ticks.append((position + (len(members) - 1) / 2, what.replace("_", " ")))
        for variant, time in members:
            error = [[max(0.0, time.median - time.low)], [max(0.0, time.high - time.median)]]
            hatch = "///" if variant.key == "grads_out" else None
            colour = COLOURS[variant.library]
            axis.bar(position, time.median, 0.9, color=colour, yerr=error, ecolor="#444444", hatch=hatch)
            position += 1
        position += 0.8
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(yscale="log", title=name)
    axis.set_xticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=7, rotation=40, ha="right")
    plain_ticks(axis)
    axis.set_ylabel("time ÷ plain step", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return [variant.library for variant, _ in bars]


def plain_ticks(axis: Any) -> None:
    """Marks a logarithmic y axis at some multiples of powers of ten, written as numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_ylim()
    subs = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5)
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def write(found: Results, path: Path) -> list[Path]:
    """Writes report and figure beside the JSON file `path`; returns what was written."""
    text, figure = path.with_suffix(".md"), path.with_suffix(".png")
    draw(found, figure)
    text.write_text(markdown(found, figure.name))
    return [text, figure]
