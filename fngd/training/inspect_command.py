"""`python -m fngd inspect`: trains for a while, then shows what natural gradient sees in one batch."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from fngd.training import data, inspection, report
from fngd.training.loop import batches
from fngd.training.models import build_model
from fngd.training.options import INSPECTED, PICTURE
from fngd.training.recipes import build_optimizer
from fngd.training.settings import DEFAULTS, Config
from fngd.training.steps import optimizer_step, set_mode
from persample.testing.command_line import check_device, console

COLUMNS = {
    "damping": "λ",
    "effective_rank": "effective\nrank of K",
    "mean": "mean\nof B·c",
    "spread": "spread\nof B·c",
    "cosine": "cosine\nof d, g",
    "share": "share of\nthe step",
}


def run(options: argparse.Namespace) -> int:
    """Trains, looks, and writes. Raises ValueError on a mistake in the options."""
    check_device(options.device)
    dataset = data.load(options.data, options.data_dir, train_size=options.train_size)
    data.say_if_larger(options.batch_size, dataset)
    report.writable(options.out)
    network = options.model or DEFAULTS[options.data].get("model", Config().model)
    sizes = {"size": dataset.size, "channels": dataset.channels, "classes": dataset.classes}
    model = build_model(network, **sizes, seed=options.seed).to(options.device)
    config = Config(batch_size=options.batch_size, device=options.device)
    images, labels = next(batches(dataset.train, config, options.seed, options.epochs))
    layers = None if options.layers is None else [name.strip() for name in options.layers.split(",")]
    if layers is not None:  # before training: two samples tell which layers there are
        inspection.check_layers(layers, list(inspection.inspect(model, images[:2], labels[:2]).grams))
    if options.epochs:
        _train(model, dataset, options)
    found = inspection.inspect(model, images, labels, alpha=options.alpha)
    title = f"{network} on {options.data} after {options.epochs} epochs with {options.optimizer}, {len(labels)} samples"
    inspection.draw(found, options.out / PICTURE, title=title, layers=layers)
    _write(found, options)
    _print(found, title)
    print(f"wrote {options.out / PICTURE} and {options.out / INSPECTED}")
    return 0


def _train(model: torch.nn.Module, dataset: data.Dataset, options: argparse.Namespace) -> None:
    from rich.progress import track

    shown = console(stderr=True)
    steps = -(-len(dataset.train.labels) // options.batch_size)
    config = Config(batch_size=options.batch_size, device=options.device, epochs=options.epochs, alpha=options.alpha)
    optimizer, scheduler = build_optimizer(options.optimizer, model, config, steps_per_epoch=steps)
    for epoch in range(options.epochs):
        words = f"epoch {epoch + 1}/{options.epochs}"
        for images, labels in track(batches(dataset.train, config, options.seed, epoch), words, steps, console=shown):
            set_mode(optimizer, training=True)
            optimizer_step(optimizer, partial(_loss, model, images, labels))
            scheduler.step()
    set_mode(optimizer, training=False)
    if hasattr(optimizer, "remove"):
        optimizer.remove()


def _loss(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(images), labels)


def _write(found: inspection.Inspection, options: argparse.Namespace) -> None:
    likeness = {
        layer: {other: inspection.likeness(gram, second) for other, second in found.grams.items()}
        for layer, gram in found.grams.items()
    }
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    content = {
        "settings": {key: value for key, value in settings.items() if key not in ("command", "out", "data_dir")},
        "torch": torch.__version__,
        "diagnostics": found.diagnostics,
        "likeness": likeness,
    }
    text = json.dumps(content, indent=1).replace("NaN", "null").replace("Infinity", "null")
    (options.out / INSPECTED).write_text(text + "\n")


def _print(found: inspection.Inspection, title: str) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("\nlayer", no_wrap=True)
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for layer, figures in found.diagnostics.items():
        table.add_row(layer or "(the model)", *(f"{figures[name]:.3g}" for name in COLUMNS))
    console().print(table)
