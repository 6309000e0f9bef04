"""Tables, figure and verdicts of `experiments.step_time`, beside the figures of the FNGD paper's Table III."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from experiments.record import Claim, Record, Result, Verdict
from experiments.regions import REGIONS
from experiments.statistics import mean, quartiles

PAPER = {
    "resnet32": {"sgd": 1.0, "kfac": 1.71, "shampoo": 1.51, "eva": 1.83, "fngd": 1.23},
    "resnet110": {"sgd": 1.0, "kfac": 2.24, "shampoo": 1.92, "eva": 2.35, "fngd": 1.58},
    "resnet18": {"sgd": 1.0, "kfac": 2.79, "shampoo": 1.62, "eva": 1.75, "fngd": 1.36},
    "resnet34": {"sgd": 1.0, "kfac": 2.76, "shampoo": 1.56, "eva": 1.56, "fngd": 1.42},
}
"""Time of an epoch over that of SGD with momentum: Table III."""
SECOND_ORDER = ("kfac", "shampoo", "eva", "skfac", "ngd", "fngd")
CLOCKS = {"wall": "wall time", "process": "processor time"}


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles over rounds of a time over SGD's in the same round."""

    low: float
    median: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def kinds(result: Result, method: str) -> list[str]:
    """The kinds of steps of a method that were timed."""
    return [key.partition("/")[2] for key in result["times"] if key.partition("/")[0] == method]


def share(method: str, kind: str, epochs: int) -> float:
    """How often a kind of step occurs."""
    from experiments.step_time import shares  # which imports this module

    return shares(method, epochs)[kind]


def ratio(result: Result, method: str, epochs: int, *, kind: str | None = None, clock: str = "wall") -> Ratio | None:
    """Returns the time of a step (of one kind, or on average) over that of SGD, round by round.

    A kind that was not timed in every round (a decomposition) enters each with its median.
    """
    chosen = kinds(result, method) if kind is None else [kind]
    base = _by_round(result, "sgd/step", clock)
    if not chosen or not base:
        return None
    values = []
    for number, plain in base.items():
        total = 0.0
        for each in chosen:
            own = _by_round(result, f"{method}/{each}", clock)
            time = own.get(number, statistics.median(result["times"][f"{method}/{each}"][clock]))
            total += time * (share(method, each, epochs) if kind is None else 1)
        values.append(total / plain)
    low, median, high = quartiles(values)
    return Ratio(low, median, high, len(values))


def _by_round(result: Result, key: str, clock: str) -> dict[int, float]:
    entry = result["times"].get(key, {"round": [], clock: []})
    return dict(zip(entry["round"], entry[clock], strict=False))


def parts(result: Result, method: str, epochs: int) -> dict[str, float]:
    """Returns the seconds of an average step by region; {} where they were not taken.

    Where the decompositions take minutes only their total is known: what it has more than a step with statistics.
    """
    total = dict.fromkeys(REGIONS, 0.0)
    for kind in kinds(result, method):
        own = _parts(result, f"{method}/{kind}")
        if not own and kind == "inverse":
            own = _parts(result, f"{method}/statistics")
            times = [statistics.median(result["times"][f"{method}/{each}"]["wall"]) for each in (kind, "statistics")]
            own["solve"] = own.get("solve", 0.0) + max(0.0, times[0] - times[1])
        if not own:
            return {}
        for name in REGIONS:
            total[name] += share(method, kind, epochs) * own[name]
    return total


def _parts(result: Result, key: str) -> dict[str, float]:
    found = result["parts"].get(key, [])
    return {name: statistics.median(each[name] for each in found) for name in REGIONS} if found else {}


def report(record: Record) -> str:
    """Returns tables: averages beside the paper's, kinds of steps, parts."""
    s, epochs = record.settings, record.settings["epochs"]
    models = [name for name in s["models"] if name in record.results]
    lines = [
        f"# Time of a training step over SGD's (FNGD paper, Table III and Fig. 8), {record.scale} scale",
        f"{record.where()}. Median (quartiles) over interleaved rounds. KFAC and Shampoo: statistics every 10 steps, "
        f"inverses every 100; SKFAC: every 8; FNGD: one epoch in {epochs} computes coefficients. Random data; batches "
        + ", ".join(f"{name} {record.results[name]['batch']}" for name in models)
        + ". The paper: RTX 3060 Ti, batch 128, whole epochs.",
    ]
    for clock, words in CLOCKS.items():
        lines += [f"## Average step, {words}", _averages(record, models, clock)]
    lines += ["## Kinds of steps, wall time", _kinds(record, models)]
    lines += [
        "## Parts of an average step, in units of SGD's whole step",
        "statistics: Gram matrices, factors; solve: coefficients, inverses, roots; direction: preconditioning where it "
        "is not part of the backward pass.",
        _parts_table(record, models),
    ]
    return "\n\n".join(lines)


def _averages(record: Record, models: list[str], clock: str) -> str:
    rows = []
    for method in record.settings["methods"]:
        cells = []
        for model in models:
            found = ratio(record.results[model], method, record.settings["epochs"], clock=clock)
            paper = PAPER.get(model, {}).get(method)
            cells.append(f"{found or '–'}" + (f" [{paper:.2f}]" if paper and clock == "wall" else ""))
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    head = ["| [paper] | " + " | ".join(models) + " |", "| --- |" + " ---: |" * len(models)]
    return "\n".join(head + rows)


def _kinds(record: Record, models: list[str]) -> str:
    rows = ["| model | method | kind | share | ms | n | over SGD |", "| --- | --- | --- | ---: | ---: | ---: | ---: |"]
    epochs = record.settings["epochs"]
    for model in models:
        result = record.results[model]
        for method in record.settings["methods"]:
            for kind in kinds(result, method):
                wall = result["times"][f"{method}/{kind}"]["wall"]
                rows.append(
                    f"| {model} | {method} | {kind} | {share(method, kind, epochs):.3f} | "
                    f"{1000 * statistics.median(wall):.1f} | {len(wall)} | {ratio(result, method, epochs, kind=kind)} |"
                )
    return "\n".join(rows)


def _parts_table(record: Record, models: list[str]) -> str:
    rows = ["| model | method | " + " | ".join(REGIONS) + " |", "| --- | --- |" + " ---: |" * len(REGIONS)]
    for model in models:
        result = record.results[model]
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

    models = [name for name in record.settings["models"] if name in record.results]
    methods, epochs = record.settings["methods"], record.settings["epochs"]
    figure = Figure(figsize=(max(3.1 * len(models) + 1.2, 7.4), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axis, model in zip(axes, models, strict=True):
        result = record.results[model]
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


def _ratios(record: Record, models: Iterable[str]) -> dict[str, dict[str, Ratio]] | None:
    """By model and method; None unless all models are there."""
    found = {}
    for model in models:
        if model not in record.results:
            return None
        pairs = {m: ratio(record.results[model], m, record.settings["epochs"]) for m in record.settings["methods"]}
        found[model] = {method: value for method, value in pairs.items() if value is not None}
    return found


def judge_lowest(record: Record) -> Verdict | None:
    """FNGD has the lowest time of all second-order methods."""
    found = _ratios(record, PAPER)
    if found is None:
        return None
    lowest = {model: min((each[m].median, m) for m in SECOND_ORDER if m in each) for model, each in found.items()}
    won = [model for model, (_, method) in lowest.items() if method == "fngd"]
    verdict = "holds" if len(won) == len(lowest) else "holds in part" if won else "does not hold"
    words = "; ".join(f"{m}: FNGD {found[m]['fngd']}, lowest {name} {value:.2f}" for m, (value, name) in lowest.items())
    return Verdict(f"time over SGD, median (quartiles) of {_n(found)} rounds, of six methods: {words}.", verdict)


def judge_ratio(record: Record) -> Verdict | None:
    """FNGD over SGD."""
    found = _ratios(record, PAPER)
    if found is None:
        return None
    words = "; ".join(f"{model} {each['fngd']}" for model, each in found.items())
    average = mean([each["fngd"].median for each in found.values()])
    lower = all(each["fngd"].median <= PAPER[model]["fngd"] for model, each in found.items())
    verdict = "holds" if lower else "holds in part" if average <= 1.37 else "does not hold"
    return Verdict(f"on average {average:.2f}: {words} (n = {_n(found)} rounds). Holds: no more than stated.", verdict)


def judge_rivals(record: Record) -> Verdict | None:
    """How much faster than KFAC, Shampoo and Eva."""
    found = _ratios(record, PAPER)
    if found is None:
        return None
    gains = {
        rival: [each[rival].median / each["fngd"].median for each in found.values()]
        for rival in ("kfac", "shampoo", "eva")
    }
    faster = [min(values) > 1 for values in gains.values()]
    verdict = "holds" if all(faster) else "holds in part" if any(faster) else "does not hold"
    words = "; ".join(f"{rival} {min(values):.2f}–{max(values):.2f} ×" for rival, values in gains.items())
    return Verdict(
        f"time of the rival over FNGD's, range over the four models: {words}. Holds: always faster.", verdict
    )


def judge_ngd(record: Record) -> Verdict | None:
    """NGD over FNGD on ResNet-32."""
    found = _ratios(record, ["resnet32"])
    if found is None or "ngd" not in found["resnet32"]:
        return None
    each = found["resnet32"]
    gain = each["ngd"].median / each["fngd"].median
    verdict = "holds" if gain >= 1.9 else "holds in part" if gain > 1.05 else "does not hold"
    return Verdict(f"ResNet-32: NGD {each['ngd']}, FNGD {each['fngd']} of SGD's time: {gain:.2f} × as fast.", verdict)


def judge_transformer(record: Record) -> Verdict | None:
    """FNGD, AdamW and KFAC on the Transformer."""
    found = _ratios(record, ["transformer"])
    if found is None:
        return None
    each = found["transformer"]
    close, gain = each["fngd"].median / each["adamw"].median, each["kfac"].median / each["fngd"].median
    verdict = "holds" if close <= 1.1 and gain > 1 else "holds in part" if close <= 1.1 or gain > 1 else "does not hold"
    words = "; ".join(f"{name} {value}" for name, value in each.items() if name != "sgd")
    s = record.settings["transformer"]
    return Verdict(
        f"FNGD takes {close:.2f} × AdamW's time, KFAC {gain:.2f} × FNGD's ({s['layers']} + {s['layers']} layers, batch "
        f"{record.results['transformer']['batch']} × {s['time']} words; over SGD: {words}).",
        verdict,
    )


def judge_backward(record: Record) -> Verdict | None:
    """FNGD's backward pass against SGD's."""
    found = []
    for model in ("resnet32", "transformer"):
        if model not in record.results:
            return None
        own, plain = (parts(record.results[model], m, record.settings["epochs"]) for m in ("fngd", "sgd"))
        if not own or not plain:
            return None
        found.append(
            (model, own["backward"] / plain["backward"], (own["statistics"] + own["solve"]) / sum(own.values()))
        )
    less = [value < 1 for _, value, _ in found]
    verdict = "holds" if all(less) else "holds in part" if any(less) else "does not hold"
    words = "; ".join(f"{m}: {value:.2f} of SGD's, Gram and solve {100 * g:.1f} % of the step" for m, value, g in found)
    return Verdict(
        f"backward pass of an average FNGD step, weighted sum included: {words}. (Here the weights scale what the "
        "backward pass computes anyway; nothing is extracted.)",
        verdict,
    )


def _n(found: dict[str, dict[str, Ratio]]) -> int:
    return min(each["fngd"].rounds for each in found.values())


CLAIMS = (
    Claim("FNGD, Table III: the shortest epochs of all second-order methods, on all four ResNets", judge_lowest),
    Claim("FNGD, Table III: epochs take 1.23, 1.58, 1.36, 1.42 × SGD's (ResNet-32, -110, -18, -34), on average "
          "1.37 ×", judge_ratio),
    Claim("FNGD, V-A: up to 2.05 × faster than KFAC, 1.22 × than Shampoo, 1.49 × than Eva", judge_rivals),
    Claim("FNGD, IV-B and Fig. 4: twice as fast as NGD (ResNet-32)", judge_ngd),
    Claim("FNGD, V-B: on the Transformer about the time of AdamW, and 2.4 × faster than KFAC", judge_transformer),
    Claim("FNGD, V-C and Fig. 8: the backward pass takes less than SGD's", judge_backward),
)  # fmt: skip
