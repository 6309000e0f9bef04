"""Tables, figures and verdicts of `experiments.images`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments import evidence, tuning
from experiments.curves import draw_curves
from experiments.record import Claim, Record, Verdict
from experiments.runs import first_epoch, spent
from experiments.statistics import mean, paired, spread, standard_error

MARGIN = 0.5
"""Points of accuracy within which two methods are called on par."""

SECOND_ORDER = ("kfac", "shampoo", "eva", "skfac")


def runs(record: Record, task: str, method: str) -> dict[int, list[dict[str, Any]]]:
    """Returns the epochs of a method's finished runs by seed; those that diverged are left out."""
    prefix = f"{task}/{method}/seed="
    found = {unit: result for unit, result in record.results.items() if unit.startswith(prefix)}
    return {int(unit.rpartition("=")[2]): result["epochs"] for unit, result in found.items() if not result["diverged"]}


def final(record: Record, task: str, method: str, figure: str = "accuracy") -> dict[int, float]:
    """Returns the figure of the last epoch by seed."""
    return {seed: epochs[-1][figure] for seed, epochs in runs(record, task, method).items()}


def entered(record: Record, task: str, *names: str) -> dict[str, dict[int, bool]]:
    """Returns by method, named with its task, whether its run of a seed diverged."""
    found: dict[str, dict[int, bool]] = {}
    for method in names:
        prefix = f"{task}/{method}/seed="
        runs_of = {unit: result for unit, result in record.results.items() if unit.startswith(prefix)}
        found[f"{method} on {task}"] = {int(u.rpartition("=")[2]): bool(r["diverged"]) for u, r in runs_of.items()}
    return found


def _verdict(record: Record, words: list[str], judgement: str, *names: str) -> Verdict:
    """The judgement on these methods in every task, if the rules of `experiments.evidence` admit one."""
    groups, edges = [], {}
    for task in record.settings["tasks"]:
        groups.append(entered(record, task, *names))
        base = list(dict.fromkeys(name.removesuffix("-long") for name in names))
        for method, options in tuning.edges(record.results, base, f"tune/{task}/", figure="accuracy").items():
            edges[f"{method} on {task}"] = options
    return evidence.verdict("; ".join(words), judgement, groups, edges)


def methods(record: Record) -> list[str]:
    """All methods, long runs behind their short ones."""
    long = record.settings["long"]
    return [name for m in record.settings["methods"] for name in ([m, f"{m}-long"] if m in long else [m])]


def report(record: Record) -> str:
    """Returns for each task a table of the methods, and one of all trials."""
    lines = [
        f"# Image classification (FNGD paper, Table II and Fig. 5–6), {record.scale} scale",
        f"{record.where()}. Same epochs, schedule (learning rate × 0.1 at 50 % and 75 %), batches and "
        f"{record.settings['trials']} tuning trials for all; `-long` has twice the epochs. Mean ± standard deviation "
        "over seeds. Seconds are process seconds (CPU time) of training alone. To a target: mean over the seeds that "
        "reach it at an epoch's end, and how many do.",
    ]
    diverged = sorted(unit for unit, result in record.results.items() if result["diverged"] and unit[:5] != "tune/")
    if diverged:
        lines.append(f"Diverged, and in no mean: {', '.join(diverged)}.")
    for name, task in record.settings["tasks"].items():
        pooled = f" averaged over {task['pool']} × {task['pool']} pixels" if task["pool"] > 1 else ""
        size = "all" if task["train_size"] is None else f"{task['train_size']}"
        lines.append(
            f"## {name}: {task['model']} on {task['data']}{pooled}, {size} training images, batch "
            f"{task['batch_size']}, {task['epochs']} epochs"
        )
        lines += [_table(record, name, task["targets"]), "### Trials: validation accuracy, %"]
        lines.append(tuning.table(record.results, record.settings["methods"], f"tune/{name}/", figure="accuracy"))
    return "\n\n".join(lines)


def _table(record: Record, task: str, targets: list[float]) -> str:
    heads = ["method", "seeds", "final accuracy, %", "training loss", "seconds an epoch", "seconds in all"]
    heads += [f"to {target:g} %: epochs, seconds" for target in targets]
    rows = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for method in methods(record):
        found = runs(record, task, method)
        total = [sum(entry["process_seconds"] for entry in epochs) for epochs in found.values()]
        each = [sum(entry["process_seconds"] for entry in epochs) / len(epochs) for epochs in found.values()]
        cells = [
            method,
            evidence.seeds(len(found), _diverged(record, task, method)),
            spread([*final(record, task, method).values()]),
            spread([*final(record, task, method, "train_loss").values()], 3),
            spread(each),
            spread(total, 1),
            *(_reached(found, target) for target in targets),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _diverged(record: Record, task: str, method: str) -> int:
    return sum(sum(runs_of.values()) for runs_of in entered(record, task, method).values())


def _reached(found: dict[int, list[dict[str, Any]]], target: float) -> str:
    counts = {seed: first_epoch(epochs, "accuracy", target) for seed, epochs in found.items()}
    times = [spent(found[seed], count) for seed, count in counts.items()]
    hits = [count for count in counts.values() if count is not None]
    if not hits:
        return "never" if counts else "–"
    return f"{mean(hits):.1f}, {mean([t for t in times if t is not None]):.1f} s ({len(hits)} of {len(counts)})"


def draw(record: Record, stem: Path) -> list[Path]:
    """A figure for each task: loss and accuracy against epochs and seconds."""
    written = []
    for task, options in record.settings["tasks"].items():
        found = {method: [*runs(record, task, method).values()] for method in methods(record)}
        if any(found.values()):
            figures = {"train_loss": "training loss", "accuracy": "test accuracy, %"}
            path = stem.with_name(f"{stem.name}-{task}.png")
            written.append(draw_curves(path, found, figures, f"{options['model']} on {task}", record))
    return written


def _complete(record: Record, *names: str) -> bool:
    seeds = record.settings["seeds"]
    return all(f"{t}/{m}/seed={s}" in record.units for t in record.settings["tasks"] for m in names for s in seeds)


def _difference(record: Record, task: str, method: str, other: str) -> tuple[str, float, float]:
    own, reference = final(record, task, method), final(record, task, other)
    values = paired(own, reference)
    return (
        f"{spread([*own.values()])} % against {spread([*reference.values()])} %",
        mean(values),
        standard_error(values),
    )


def _half_epochs(record: Record) -> Verdict | None:
    """FNGD against SGD with twice its epochs, and against SGD on the same schedule."""
    if not _complete(record, "fngd", "sgd", "sgd-long"):
        return None
    words, holds, gains = [], [], []
    for task in record.settings["tasks"]:
        long, gap, _ = _difference(record, task, "fngd", "sgd-long")
        _, gain, error = _difference(record, task, "fngd", "sgd")
        holds.append(gap > -MARGIN)
        gains.append(gain > 2 * error)
        words.append(
            f"{task}: FNGD {long} of SGD with twice the epochs ({gap:+.2f}); SGD on FNGD's schedule "
            f"{spread([*final(record, task, 'sgd').values()])} % (FNGD − SGD {gain:+.2f} ± {error:.2f}, standard error)"
        )
    judgement = "holds" if all(holds) and all(gains) else "holds in part" if any(holds) and any(gains) else ""
    return _verdict(record, words, judgement or "does not hold", "fngd", "sgd", "sgd-long")


def _comparable(record: Record) -> Verdict | None:
    """FNGD's final accuracy against the best second-order method's."""
    if not _complete(record, "fngd", *SECOND_ORDER):
        return None
    words, holds = [], []
    for task in record.settings["tasks"]:
        means = {m: mean([*final(record, task, m).values()]) for m in SECOND_ORDER if final(record, task, m)}
        if not means:
            return _verdict(record, [f"{task}: every other second-order method diverged"], "undecided", *SECOND_ORDER)
        top = max(means, key=lambda m: means[m])
        text, gap, error = _difference(record, task, "fngd", top)
        holds.append(gap > -max(MARGIN, 2 * error))
        words.append(f"{task}: FNGD {text} of the best other one, {top} ({gap:+.2f} ± {error:.2f})")
    judgement = "holds" if all(holds) else "holds in part" if any(holds) else "does not hold"
    return _verdict(record, words, judgement, "fngd", *SECOND_ORDER)


def _soonest(record: Record) -> Verdict | None:
    """Seconds to the highest target: is FNGD's the least of all methods?"""
    everyone = ("sgd", "kfac", "shampoo", "eva", "fngd")
    if not _complete(record, *everyone, "sgd-long"):
        return None
    words, holds = [], []
    for task, options in record.settings["tasks"].items():
        target = options["targets"][-1]
        times: dict[str, float | None] = {}
        for method in (*everyone, "sgd-long"):
            found = runs(record, task, method)
            each = [spent(epochs, first_epoch(epochs, "accuracy", target)) for epochs in found.values()]
            sound = [value for value in each if value is not None]
            times[method] = mean(sound) if sound and len(sound) == len(record.settings["seeds"]) else None
        reached = {method: value for method, value in times.items() if value is not None}
        own = reached.get("fngd")
        holds.append(own is not None and own <= min(reached.values()))
        listed = ", ".join(
            f"{method} {'not by all seeds' if value is None else f'{value:.0f} s'}" for method, value in times.items()
        )
        words.append(f"{task}, to {target:g} %: {listed}")
    judgement = "holds" if all(holds) else "holds in part" if any(holds) else "does not hold"
    return _verdict(record, words, judgement, *everyone, "sgd-long")


CLAIMS = (
    Claim("Section V-A: FNGD converges in half of SGD's iterations (SGD had 200 epochs, FNGD 100)", _half_epochs),
    Claim("Fig. 5–6: FNGD generalises comparably to the other second-order methods", _comparable),
    Claim(
        "Table II: FNGD reaches the target accuracy first in time (93.5 %: 3549 s; Shampoo 4272, SGD 4299, KFAC 5086)",
        _soonest,
    ),
)
