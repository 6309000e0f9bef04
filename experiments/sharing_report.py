"""Tables, figure and verdicts of `experiments.sharing`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import evidence
from experiments.record import Claim, Record, Verdict
from experiments.statistics import mean, paired, spread, standard_error

MARGIN = 0.3
"""Points of test accuracy within which two methods are called on par."""


def parsed(unit: str) -> tuple[str, float | None, int]:
    """Returns (method, α, seed).

    >>> parsed("ngd/alpha=0.01/seed=2")
    ('ngd', 0.01, 2)
    """
    method, *rest = unit.split("/")
    values = dict(part.split("=") for part in rest)
    return method, float(values["alpha"]) if "alpha" in values else None, int(values["seed"])


def final(record: Record, method: str, alpha: float | None, figure: str) -> dict[int, float]:
    """Returns a figure of the last epoch by seed; runs that diverged are left out."""
    found = {}
    for unit, result in record.results.items():
        name, own, seed = parsed(unit)
        if name == method and (own == alpha or method == "constant") and result["finite"]:
            found[seed] = result["epochs"][-1][figure]
    return found


def entered(record: Record, method: str, alpha: float) -> dict[str, dict[int, bool]]:
    """Returns, named with its α, whether a method's run of a seed diverged."""
    found: dict[int, bool] = {}
    for unit, result in record.results.items():
        name, own, seed = parsed(unit)
        if name == method and (own == alpha or method == "constant"):
            found[seed] = not result["finite"]
    return {f"{method} (α={alpha:g})": found}


def _verdict(record: Record, text: str, judgement: str, *names: str) -> Verdict:
    """The judgement on these methods at every α, if the rules of `experiments.evidence` admit one."""
    groups = [
        {key: runs for name in names for key, runs in entered(record, name, alpha).items()}
        for alpha in record.settings["alphas"]
    ]
    return evidence.verdict(text, judgement, [group for group in groups if all(group.values())])


def correlations(record: Record, method: str, alpha: float, epoch: int) -> list[float]:
    """Returns the correlations of stored and fresh factors in an epoch's first batch: one a layer and seed."""
    found: list[float] = []
    for unit, result in record.results.items():
        if parsed(unit)[:2] == (method, alpha) and len(result["epochs"]) > epoch:
            values = result["epochs"][epoch].get("correlation", {}).values()
            found += [value for value in values if value is not None]
    return found


def _describe(record: Record) -> str:
    s = record.settings
    size = "" if s["train_size"] is None else f", {s['train_size']} training images"
    return (
        f"{s['model']} on {s['data']}{size}, batch {s['batch_size']}, {s['epochs']} epochs, lr {s['lr']:g} "
        f"(schedule {s['schedule']}), {len({parsed(unit)[2] for unit in record.units})} seeds"
    )


def report(record: Record) -> str:
    """Returns tables: final figures by method and α, differences to NGD, and likeness of stored and fresh factors."""
    s = record.settings
    lines = [
        f"# Does sharing hurt? (FNGD paper, Fig. 4), {record.scale} scale",
        f"{_describe(record)}. {record.where()}. Mean ± standard deviation over seeds of the last epoch; differences "
        "are taken seed by seed. `constant` is SGD and does not depend on α. The shared learning rate is not tuned for "
        "each α: under `absorb` the mean factor falls with α, and with it the length of a step (last table).",
    ]
    diverged = sorted(unit for unit, result in record.results.items() if not result["finite"])
    if diverged:
        lines.append(f"Diverged, and in no mean: {', '.join(diverged)}.")
    lines += ["## Test accuracy, %", _figures(record, "test_accuracy", 2)]
    lines += ["## Training loss", _figures(record, "train_loss", 4)]

    def difference(method: str, alpha: float) -> str:
        values = [final(record, each, alpha, "test_accuracy") for each in (method, "ngd")]
        return "0" if method == "ngd" else spread(paired(*values), 2, sign=True)

    lines += ["## Test accuracy minus that of NGD, points", _table(record, difference)]
    last = s["epochs"] - 1
    lines += [
        f"## Correlation of stored with fresh factors in the first batch of epoch {last + 1}",
        "Mean ± standard deviation over layers and seeds; 1 would mean that nothing has changed, 0 that what was "
        "stored tells nothing about the samples it is applied to.",
        _table(record, lambda m, a: spread(correlations(record, m, a, last), 2)),
        "## Mean of the factors B·c in the last epoch",
        _figures(record, "factor_mean", 3),
        "## Standard deviation of the factors within a batch in the last epoch",
        _figures(record, "factor_std", 4),
    ]
    return "\n\n".join(lines)


def _figures(record: Record, figure: str, digits: int) -> str:
    return _table(record, lambda method, alpha: spread([*final(record, method, alpha, figure).values()], digits))


def _table(record: Record, cell: Callable[[str, float], str]) -> str:
    alphas = record.settings["alphas"]
    rows = [
        f"| {method} | " + " | ".join(cell(method, a) for a in alphas) + " |" for method in record.settings["methods"]
    ]
    return "\n".join(
        ["| | " + " | ".join(f"α = {a:g}" for a in alphas) + " |", "| --- |" + " ---: |" * len(alphas), *rows]
    )


COLOURS = {
    "constant": "#7f7f7f",
    "ngd": "#2ca02c",
    "fngd": "#d62728",
    "permuted": "#9467bd",
    "sample": "#ff7f0e",
    "refreshed": "#17becf",
}


def draw(record: Record, stem: Path) -> list[Path]:
    """Final loss and accuracy against α, likeness by epoch, and the paper's curves at one α."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    alphas = record.settings["alphas"]
    middle = alphas[len(alphas) // 2 - (len(alphas) > 2)]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _draw_final(axes[0, 0], record, "train_loss", "training loss, last epoch")
    _draw_final(axes[0, 1], record, "test_accuracy", "test accuracy, %, last epoch")
    axes[0, 0].set(yscale="log")
    axes[0, 0].legend(frameon=False, ncols=2)
    _draw_likeness(axes[1, 0], record, middle)
    _draw_losses(axes[1, 1], record, middle)
    for axis in axes[1]:
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat:
        axis.grid(alpha=0.3, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_describe(record) + "; mean and range over seeds (and layers)", fontsize=10)
    path = stem.with_suffix(".png")
    figure.savefig(path, dpi=150)
    return [path]


def _draw_final(axis: Any, record: Record, name: str, words: str) -> None:
    """A figure of the last epoch against α."""
    methods = record.settings["methods"]
    for shift, method in enumerate(methods):
        points = [(a, [*final(record, method, a, name).values()]) for a in record.settings["alphas"]]
        points = [(a * 1.06 ** (shift - len(methods) / 2), values) for a, values in points if values]
        if not points:
            continue
        x, centre = [a for a, _ in points], [mean(values) for _, values in points]
        below = [c - min(v) for c, (_, v) in zip(centre, points, strict=True)]
        above = [max(v) - c for c, (_, v) in zip(centre, points, strict=True)]
        style = "o" + _style(method)
        axis.errorbar(x, centre, [below, above], color=COLOURS[method], fmt=style, ms=4, lw=1.4, label=method)
    axis.set(xscale="log", xlabel="α", ylabel=words)


def _draw_likeness(axis: Any, record: Record, alpha: float) -> None:
    """How much stored factors resemble fresh ones, by epoch."""
    for method in ("fngd", "permuted", "sample", "refreshed"):
        by_epoch = {e + 1: correlations(record, method, alpha, e) for e in range(1, record.settings["epochs"])}
        by_epoch = {epoch: values for epoch, values in by_epoch.items() if values}
        if by_epoch:
            x, values = [*by_epoch], [*by_epoch.values()]
            axis.plot(x, [*map(mean, values)], "o-", color=COLOURS[method], ms=4, lw=1.4, label=method)
            axis.fill_between(x, [*map(min, values)], [*map(max, values)], color=COLOURS[method], alpha=0.10, lw=0)
    axis.set(xlabel="epoch", ylabel=f"correlation of stored and fresh factors\nα = {alpha:g}", ylim=(-1, 1))
    axis.axhline(0, color="black", lw=0.6)


def _draw_losses(axis: Any, record: Record, alpha: float) -> None:
    """Training loss by epoch, where no seed diverged."""
    x = range(1, record.settings["epochs"] + 1)
    for method in record.settings["methods"]:
        runs = [
            result["epochs"]
            for unit, result in record.results.items()
            if parsed(unit)[0] == method and parsed(unit)[1] in (alpha, None) and result["finite"]
        ]
        if runs:
            losses = [[epochs[number - 1]["train_loss"] for epochs in runs] for number in x]
            axis.plot(x, [*map(mean, losses)], _style(method), color=COLOURS[method], lw=1.4, label=method)
            axis.fill_between(x, [*map(min, losses)], [*map(max, losses)], color=COLOURS[method], alpha=0.12, lw=0)
    axis.set(xlabel="epoch", ylabel=f"training loss\nα = {alpha:g}", yscale="log")


def _style(method: str) -> str:
    return "--" if method == "constant" else "-"


def _compare(record: Record, own: str, other: str) -> list[tuple[float, list[float]]]:
    """Paired differences in test accuracy by α, where there are at least two seeds."""
    pairs = [
        (a, paired(final(record, own, a, "test_accuracy"), final(record, other, a, "test_accuracy")))
        for a in record.settings["alphas"]
    ]
    return [(a, values) for a, values in pairs if len(values) > 1]


def _worse(values: list[float]) -> bool:
    """Lower by more than the margin and by more than two standard errors."""
    return mean(values) < -MARGIN and mean(values) < -2 * standard_error(values)


def _words(record: Record, pairs: list[tuple[float, list[float]]]) -> str:
    each = "; ".join(f"α={a:g}: {spread(values, 2, sign=True)}" for a, values in pairs)
    return f"{each} points of test accuracy (± std of paired differences; {_describe(record)})"


def judge_on_par(record: Record) -> Verdict | None:
    """FNGD − NGD."""
    pairs = _compare(record, "fngd", "ngd")
    if not pairs:
        return None
    worse = [a for a, values in pairs if _worse(values)]
    verdict = "holds" if not worse else "does not hold" if len(worse) == len(pairs) else "holds in part"
    note = f" FNGD is worse (by more than {MARGIN} points and 2 standard errors) at α = {worse}." if worse else ""
    return _verdict(record, f"FNGD − NGD: {_words(record, pairs)}.{note}", verdict, "fngd", "ngd")


def judge_whose(record: Record) -> Verdict | None:
    """Permuted − FNGD: whether it matters to whom a coefficient goes."""
    pairs = _compare(record, "permuted", "fngd")
    if not pairs:
        return None
    worse = [a for a, values in pairs if _worse(values)]
    verdict = "does not hold" if not worse else "holds" if len(worse) == len(pairs) else "holds in part"
    text = f"permuted − FNGD: {_words(record, pairs)}; permuting hurts at α = {worse or 'none'}."
    return _verdict(record, text, verdict, "permuted", "fngd")


def judge_constant(record: Record) -> Verdict | None:
    """Whether stored and fresh coefficients of the same samples agree."""
    last = record.settings["epochs"] - 1
    found = [(a, correlations(record, "sample", a, last)) for a in record.settings["alphas"]]
    found = [(a, values) for a, values in found if len(values) > 1]
    if not found:
        return None
    levels = [mean(values) for _, values in found]
    verdict = "holds" if min(levels) > 0.9 else "holds in part" if max(levels) > 0.5 else "does not hold"
    each = "; ".join(f"α={a:g}: {spread(values, 2)}" for a, values in found)
    return _verdict(
        record,
        f"correlation of the first epoch's factors with fresh ones of the same samples, epoch {last + 1}: {each} "
        f"(± std over layers and seeds; {_describe(record)}). Called constant above 0.9, partly above 0.5.",
        verdict,
        "sample",
    )


def judge_better(record: Record) -> Verdict | None:
    """NGD − SGD at the same rate and schedule: whether there is anything to share."""
    pairs = _compare(record, "ngd", "constant")
    if not pairs:
        return None
    better = [a for a, values in pairs if _worse([-value for value in values])]
    verdict = "does not hold" if not better else "holds" if len(better) == len(pairs) else "holds in part"
    text = f"NGD − SGD: {_words(record, pairs)}; better at α = {better or 'none'}."
    return _verdict(record, text, verdict, "ngd", "constant")


CLAIMS = (
    Claim("FNGD, Fig. 4 and IV-B: with shared coefficients performance is on par with NGD", judge_on_par),
    Claim(
        "FNGD, IV-B: random coefficients would not do, because those of different layers belong together",
        judge_whose,
    ),
    Claim(
        "FNGD, IV-B: the coefficients are determined by the nature of the samples and constant across epochs",
        judge_constant,
    ),
    Claim("FNGD, I and V: preconditioning by the coefficients (Eq. 9) improves on the plain gradient", judge_better),
)
