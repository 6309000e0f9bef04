"""Correlation matrices of early and late layers (FNGD paper, Section IV-B and Fig. 3).

The paper shows UᵀU of the first two and the last two layers of ResNet-32 and says that neighbours are alike while the
ends differ. Here the matrices are drawn as cosines, and alikeness is measured for all pairs of layers: see
`fngd.training.inspection`. A batch is looked at before training and after some steps of SGD. The batch normalisation's
coupling of samples is taken as in the paper: a sample's gradient is what flows through its rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from experiments.record import Claim, Context, Experiment, Record, Result, Settings, Verdict
from experiments.statistics import mean, spread
from fngd.training import data, inspection
from fngd.training.loop import batches
from fngd.training.models import build_model
from fngd.training.settings import Config

SMALL: Settings = {
    "data": "cifar10",
    "model": "resnet32",
    "augment": True,
    "train_batch": 64,
    "batch": 128,
    "steps": [0, 100],
    "lr": 0.05,
    "alpha": 1e-2,
    "seeds": [0, 1, 2],
}
FULL: Settings = {**SMALL, "train_batch": 128, "steps": [0, 391, 3910, 19550], "lr": 0.1}
SMOKE: Settings = {
    **SMALL,
    "data": "digits",
    "model": "cnn",
    "augment": False,
    "batch": 32,
    "steps": [0, 5],
    "seeds": [0],
}


def units(settings: Settings) -> list[str]:
    """One for each seed."""
    return [f"seed={seed}" for seed in settings["seeds"]]


def run(unit: str, settings: Settings, context: Context) -> Result:
    """Trains and looks; returns what was seen at each look, and the first seed's matrices at the last."""
    seed = int(unit.removeprefix("seed="))
    dataset = data.load(settings["data"], context.data_dir)
    sizes = {"size": dataset.size, "channels": dataset.channels, "classes": dataset.classes}
    model = build_model(settings["model"], **sizes, seed=seed).to(context.device)
    config = Config(batch_size=settings["train_batch"], device=context.device, augment=settings["augment"])
    images, labels = (part[: settings["batch"]].to(context.device) for part in vars(dataset.train).values())
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["lr"], momentum=0.9, weight_decay=5e-4)
    last, done, epoch, seen = max(settings["steps"]), 0, 0, {}
    result: Result = {}
    while True:
        for batch in batches(dataset.train, config, seed, epoch):
            if done in settings["steps"]:
                found = inspection.inspect(model, images, labels, alpha=settings["alpha"])
                seen[str(done)] = _figures(found)
                if done == last:
                    if seed == settings["seeds"][0]:
                        result["matrices"] = {layer: _packed(found, layer) for layer in inspection.ends([*found.grams])}
                    return {**result, "seen": seen, "labels": sorted(labels.tolist())}
            model.train()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            context.progress(done, last, f"{done} steps")
        epoch += 1


def _figures(found: inspection.Inspection) -> Result:
    grams = list(found.grams.values())
    return {
        "layers": list(found.grams),
        "likeness": [[round(inspection.likeness(a, b), 3) for b in grams] for a in grams],
        "effective_rank": [found.diagnostics[layer]["effective_rank"] for layer in found.grams],
        "spread": [found.diagnostics[layer]["spread"] for layer in found.grams],
    }


def _packed(found: inspection.Inspection, layer: str) -> list[int]:
    """The cosines above the diagonal, row by row, in hundredths."""
    matrix = inspection.sorted_cosines(found, layer)
    rows, columns = torch.triu_indices(len(matrix), len(matrix), offset=1)
    return (100 * matrix[rows, columns]).round().int().tolist()


def unpacked(entries: list[int], size: int) -> torch.Tensor:
    """Returns the matrix of cosines.

    >>> unpacked([50], 2).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    matrix = torch.zeros(size, size)
    rows, columns = torch.triu_indices(size, size, offset=1)
    matrix[rows, columns] = torch.tensor(entries) / 100
    return matrix + matrix.T + torch.eye(size)


def likenesses(record: Record, step: int) -> dict[str, list[float]]:
    """Returns by kind of pair its likeness in each seed: the paper's pairs, and averages over all layers."""
    result: dict[str, list[float]] = {
        "first two": [],
        "last two": [],
        "first and last": [],
        "neighbouring": [],
        "all": [],
    }
    for each in record.results.values():
        table = each["seen"][str(step)]["likeness"]
        count = len(table)
        pairs = [(i, j) for i in range(count) for j in range(i)]
        result["first two"].append(table[0][1])
        result["last two"].append(table[-2][-1])
        result["first and last"].append(mean([table[i][j] for i in (0, 1) for j in (-1, -2)]))
        result["neighbouring"].append(mean([table[i][j] for i, j in pairs if i - j == 1]))
        result["all"].append(mean([table[i][j] for i, j in pairs]))
    return result


def _describe(record: Record) -> str:
    s = record.settings
    return f"{s['model']} on {s['data']}, batch {s['batch']}, {len(record.units)} seeds"


def report(record: Record) -> str:
    """Returns the table of likenesses."""
    rows = {step: likenesses(record, step) for step in record.settings["steps"]}
    names = list(next(iter(rows.values())))
    lines = [
        f"# Correlation matrices (FNGD paper, Fig. 3), {record.scale} scale",
        f"{_describe(record)}; {record.where()}. Likeness of two layers: correlation of their cosines above the "
        "diagonal, 1 where the same pairs of samples are alike. Mean ± standard deviation over seeds.",
        "\n".join(
            [
                "| steps | " + " | ".join(f"{name} layers" for name in names) + " |",
                "| ---: |" + " ---: |" * len(names),
                *(
                    f"| {step} | " + " | ".join(spread(row[name]) for name in names) + " |"
                    for step, row in rows.items()
                ),
            ]
        ),
    ]
    return "\n\n".join(lines)


def draw(record: Record, stem: Path) -> list[Path]:
    """The first seed's matrices after the last step; likeness of all layers and effective rank, at each look."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = [each for each in record.results.values() if "matrices" in each]
    steps = record.settings["steps"]
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 1)
    top, bottom = (figure.add_subfigure(grid[row]) for row in range(2))
    if chosen:
        size = len(chosen[0]["labels"])
        inspection.draw_matrices(top, {layer: unpacked(e, size) for layer, e in chosen[0]["matrices"].items()})
    axes: Any = bottom.subplots(1, len(steps) + 1, squeeze=False)[0]
    for axis, step in zip(axes, steps, strict=False):
        tables = torch.tensor([each["seen"][str(step)]["likeness"] for each in record.results.values()])
        inspection.draw_likeness(axis, tables.mean(0).tolist())
        axis.set_title(f"likeness of layers, {step} steps", fontsize=9)
        for each in record.results.values():
            ranks = each["seen"][str(step)]["effective_rank"]
            label = f"{step} steps" if each is next(iter(record.results.values())) else None
            axes[-1].plot(range(1, len(ranks) + 1), ranks, color=f"C{steps.index(step)}", lw=1, label=label)
    axes[-1].set(xlabel="layer", ylabel="effective rank of K", yscale="log")
    axes[-1].legend(frameon=False, fontsize=8)
    axes[-1].grid(alpha=0.3, lw=0.6, which="both")
    axes[-1].spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{_describe(record)}; above: one seed after {steps[-1]} steps", fontsize=10)
    path = stem.with_suffix(".png")
    figure.savefig(path, dpi=150)
    return [path]


def judge(record: Record) -> Verdict | None:
    """Neighbours alike, ends different? Judged at the last look; the earlier ones are told."""
    if len(record.units) < 2:
        return None
    words, fits = [], [False]
    for step in record.settings["steps"]:
        found = likenesses(record, step)
        words.append(f"after {step} steps " + ", ".join(f"{name} {spread(found[name])}" for name in list(found)[:3]))
        fits = [mean(found["first two"]) > 0.5, mean(found["last two"]) > 0.5, mean(found["first and last"]) < 0.5]
    verdict = "holds" if all(fits) else "holds in part" if any(fits[:2]) and fits[2] else "does not hold"
    return Verdict(
        f"likeness {'; '.join(words)} (± std over seeds, {_describe(record)}). Alike: above "
        "0.5; judged after the last step.",
        verdict,
    )


EXPERIMENT = Experiment(
    name="correlation",
    help="correlation matrices of early and late layers",
    source="FNGD paper, Fig. 3",
    scales={"small": SMALL, "full": FULL, "smoke": SMOKE},
    units=units,
    run=run,
    report=report,
    draw=draw,
    claims=(
        Claim(
            "FNGD, IV-B and Fig. 3: correlation matrices of neighbouring layers are alike, those of early and late "
            "layers differ (ResNet-32, first two and last two)",
            judge,
        ),
    ),
    growing=("seeds",),
)
