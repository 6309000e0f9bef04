"""Tables, figure and verdicts of `experiments.translation`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments import evidence, tuning
from experiments.curves import draw_curves
from experiments.record import Claim, Record, Verdict
from experiments.statistics import mean, paired, spread, standard_error

READINGS = ("fngd", "fngd-per-layer")
"""The paper's FNGD in both readings of its damping, at the paper's constant rate."""


def runs(record: Record, method: str) -> dict[int, dict[str, Any]]:
    """Returns a method's finished runs by seed; those that diverged are left out."""
    found = {unit: result for unit, result in record.results.items() if unit.startswith(f"{method}/seed=")}
    return {int(unit.rpartition("=")[2]): result for unit, result in found.items() if not result["diverged"]}


def entered(record: Record, *names: str) -> dict[str, dict[int, bool]]:
    """Returns by method whether its run of a seed diverged."""
    found: dict[str, dict[int, bool]] = {name: {} for name in names}
    for unit, result in record.results.items():
        method, _, seed = unit.partition("/seed=")
        if method in found and seed:
            found[method][int(seed)] = bool(result["diverged"])
    return found


def _verdict(record: Record, text: str, judgement: str, *names: str) -> Verdict:
    """The judgement on these methods, if the rules of `experiments.evidence` admit one."""
    edges = tuning.edges(record.results, names, "tune/", figure="loss", smallest=True)
    return evidence.verdict(text, judgement, [entered(record, *names)], edges)


def scores(record: Record, method: str, search: str = "beam") -> dict[int, float]:
    """Returns BLEU on the test sentences by seed."""
    return {seed: result["test"][search] for seed, result in runs(record, method).items()}


def report(record: Record) -> str:
    """Returns a table of the methods, the best run, some translations, and one of all trials."""
    s = record.settings
    size = "all" if s["train_size"] is None else f"{s['train_size']:,}"
    model = ", ".join(f"{name} {value}" for name, value in s["model"].items())
    lines = [
        f"# Translation (FNGD paper, Fig. 7), {record.scale} scale",
        f"{s['corpus']}, {s['source']} → {s['target']}, {size} training pairs, BPE of {s['words']:,}, Transformer "
        f"({model}), batch {s['batch_size']}, {s['epochs']} epochs, label smoothing {s['label_smoothing']}; "
        f"{record.where()}. {s['trials']} tuning trials for each method. Mean ± standard deviation over seeds. "
        "Seconds are process seconds (CPU time) of training alone.",
        _table(record),
    ]
    diverged = sorted(unit for unit, result in record.results.items() if result["diverged"] and unit[:5] != "tune/")
    if diverged:
        lines.append(f"Diverged, and in no mean: {', '.join(diverged)}.")
    for unit, result in record.results.items():
        if unit.startswith("best/") and "test" in result:
            lines += [f"## The long run, {unit.removeprefix('best/')}", _best(record, result)]
    lines += [
        "## Trials: validation loss, nats a word",
        tuning.table(record.results, s["methods"], "tune/", figure="loss", smallest=True, digits=3),
    ]
    return "\n\n".join(lines)


def _table(record: Record) -> str:
    heads = ["method", "seeds", "BLEU, greedy", f"BLEU, {record.settings['beams']} beams", "validation loss"]
    heads += ["training loss", "seconds an epoch"]
    rows = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for method in record.settings["methods"]:
        found = [*runs(record, method).values()]
        cells = [
            method,
            evidence.seeds(len(found), sum(entered(record, method)[method].values())),
            *(spread([*scores(record, method, search).values()]) for search in ("greedy", "beam")),
            *(spread([each["epochs"][-1][key] for each in found], 3) for key in ("loss", "train_loss")),
            spread([_seconds(each) for each in found], 1),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    signatures = sorted({each["test"]["signature"] for each in record.results.values() if "test" in each})
    return "\n".join(rows) + (
        f"\n\nBLEU on the test sentences (of Multi30K: test_2016_flickr); {', '.join(signatures)}."
        if signatures
        else ""
    )


def _seconds(result: dict[str, Any]) -> float:
    return mean([entry["process_seconds"] for entry in result["epochs"]])


def _best(record: Record, result: dict[str, Any]) -> str:
    bleus = ", ".join(f"{entry['bleu']:.1f}" for entry in result["epochs"])
    seconds = sum(entry["process_seconds"] for entry in result["epochs"])
    lines = [
        f"{result['pairs']:,} training pairs, {len(result['epochs'])} epochs, {result['parameters']:,} parameters, "
        f"{tuning.in_words(result['options'])}: BLEU **{result['test']['greedy']:.1f}** greedy, "
        f"**{result['test']['beam']:.1f}** with {record.settings['beams']} beams on the test sentences; "
        f"validation BLEU by epoch: {bleus}; {seconds:.0f} process seconds.",
        "| source | reference | translation |\n| --- | --- | --- |\n"
        + "\n".join(f"| {' | '.join(_cell(part) for part in row)} |" for row in result["test"]["examples"]),
    ]
    return "\n\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def draw(record: Record, stem: Path) -> list[Path]:
    """Training loss and validation BLEU against epochs and seconds."""
    methods = record.settings["methods"]
    found = {method: [result["epochs"] for result in runs(record, method).values()] for method in methods}
    if not any(found.values()):
        return []
    figures = {"train_loss": "training loss, label smoothed", "bleu": "validation BLEU, greedy"}
    return [
        draw_curves(stem.with_suffix(".png"), found, figures, f"Transformer on {record.settings['corpus']}", record)
    ]


def _complete(record: Record, *names: str) -> bool:
    return all(f"{name}/seed={seed}" in record.units for name in names for seed in record.settings["seeds"])


def _difference(record: Record, method: str, other: str) -> tuple[float, float]:
    values = paired(scores(record, method), scores(record, other))
    return mean(values), standard_error(values)


def _listed(record: Record, *names: str) -> str:
    return ", ".join(f"{name} {spread([*scores(record, name).values()], 1)}" for name in names)


def _own(record: Record) -> str | None:
    """The better reading of FNGD; None where every run of both diverged."""
    found = {name: mean([*scores(record, name).values()]) for name in READINGS if scores(record, name)}
    return max(found, key=lambda name: found[name]) if found else None


def _how(record: Record) -> str:
    return f"SacreBLEU, {record.settings['beams']} beams"


def _above(record: Record) -> Verdict | None:
    others = ("adamw", "shampoo", "kfac")
    if not _complete(record, *READINGS, *others):
        return None
    own = _own(record)
    if own is None:
        text = f"every run of FNGD diverged; {_listed(record, *others)}"
        return _verdict(record, text, "does not hold", *READINGS, *others)
    gaps = {other: _difference(record, own, other) for other in others if scores(record, other)}
    text = "; ".join(
        f"{own} − {other} {gap:+.1f} ± {error:.1f} (standard error)" for other, (gap, error) in gaps.items()
    )
    ahead = [gap > 2 * error for gap, error in gaps.values()]
    judgement = "holds" if all(ahead) else "holds in part" if any(ahead) else "does not hold"
    text = f"{_listed(record, *READINGS, *others)}; {text}; {_how(record)}"
    return _verdict(record, text, judgement, own, *others)


def _highest(record: Record) -> Verdict | None:
    names = ("adamw-warmup", "fngd-warmup", *READINGS)
    if not _complete(record, *names):
        return None
    found = {name: mean([*scores(record, name).values()]) for name in names[1:] if scores(record, name)}
    if not found:
        return _verdict(record, "every run of FNGD diverged", "does not hold", *names)
    own = max(found, key=lambda name: found[name])
    gap, error = _difference(record, own, "adamw-warmup")
    judgement = "holds" if gap > 2 * error else "does not hold" if gap < -2 * error else "undecided"
    text = f"{_listed(record, *names)}; {own} − adamw-warmup {gap:+.1f} ± {error:.1f} (standard error)"
    return _verdict(record, f"{text}; {_how(record)}", judgement, own, "adamw-warmup")


def _time(record: Record) -> Verdict | None:
    names = ("adamw", "kfac", "shampoo", "fngd")
    if not _complete(record, *names) or any(not runs(record, name) for name in names):
        return None
    seconds = {name: [_seconds(result) for result in runs(record, name).values()] for name in names}
    means = {name: mean(values) for name, values in seconds.items()}
    ratios = [means["fngd"] / means["adamw"], means["kfac"] / means["fngd"], means["shampoo"] / means["fngd"]]
    text = (
        f"process seconds an epoch: {', '.join(f'{name} {spread(values, 1)}' for name, values in seconds.items())}; "
        f"FNGD {ratios[0]:.2f} × AdamW, KFAC {ratios[1]:.2f} × FNGD, Shampoo {ratios[2]:.2f} × FNGD"
    )
    holds = [ratios[0] < 1.1, ratios[1] > 1.5, ratios[2] > 2.0]
    judgement = "holds" if all(holds) else "holds in part" if any(holds) else "does not hold"
    return evidence.verdict(text, judgement, [entered(record, *names)])  # time does not depend on what was tuned


CLAIMS = (
    Claim("Fig. 7: FNGD's BLEU is 24 above AdamW's, 11 above Shampoo's, 4 above KFAC's (constant rates)", _above),
    Claim(
        "Section V-B: FNGD yields the highest BLEU, tested against AdamW with warm-up, which the paper left out",
        _highest,
    ),
    Claim(
        "Section V-B: FNGD takes about AdamW's time, KFAC 2.4 times and Shampoo 5.7 times as much as FNGD "
        "(512 wide in the paper)",
        _time,
    ),
)
