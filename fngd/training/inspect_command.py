"""`python -m fngd inspect`: trains for a while, then shows what natural gradient sees in one batch."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from fngd.training import data, inspection, report
from fngd.training.loop import batches
from fngd.training.models import MODELS, build_model
from fngd.training.recipes import DEFAULTS, OPTIMIZERS, Config, build_optimizer
from persample.testing.command_line import whole

PICTURE, FIGURES = "inspect.png", "inspect.json"
COLUMNS = {
    "damping": "λ",
    "effective_rank": "effective\nrank of K",
    "mean": "mean\nof B·c",
    "spread": "spread\nof B·c",
    "cosine": "cosine\nof d, g",
    "share": "share of\nthe step",
}


def add_parser(commands: Any) -> None:
    """Adds the options."""
    parser = commands.add_parser(
        "inspect",
        help="correlation matrices of layers and diagnostics; picture and JSON",
        description="Trains a network for some epochs and looks at one batch of training images: correlation matrices "
        "of the first two and the last two layers, how alike layers are, and for each layer the damping λ, the "
        f"coefficients, and the step. Writes {PICTURE} and {FIGURES}.",
    )
    add = parser.add_argument
    add("--data", choices=list(data.DATASETS), default="digits", help="data set (default %(default)s)")
    add("--data-dir", metavar="DIR", help="folder of cifar-10-batches-py or FashionMNIST/raw; not for digits")
    add("--train-size", type=whole(0), metavar="N", help="train on the first N images (default all)")
    add("--model", choices=list(MODELS), help="network (default cnn; resnet20 for cifar10)")
    add("--optimizer", choices=list(OPTIMIZERS), default="fngd", help="to train with (default %(default)s)")
    add("--epochs", type=whole(0), default=3, metavar="N", help="to train before looking; 0: untrained (default 3)")
    add("--batch-size", type=whole(0), default=128, metavar="N", help="also of the batch that is shown (default 128)")
    add("--alpha", type=float, default=1e-2, metavar="X", help="damping relative to ‖K‖_F (default %(default)s)")
    add("--layers", metavar="A,B,…", help="whose matrices to draw (default: the first two and the last two)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and batches (default 0)")
    add("--device", default="cpu", metavar="NAME", help="cpu (default), cuda, cuda:1, …")
    add("--out", type=Path, default=Path("results/inspect"), metavar="DIR", help="where to write (default %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Trains, looks, and writes. Raises ValueError or DataError on a mistake in the options."""
    for name in ("batch_size", "train_size"):
        if getattr(options, name) == 0:
            raise ValueError(f"--{name.replace('_', '-')} 0: it must be at least 1")
    if not 0 < options.alpha < math.inf:
        raise ValueError(f"--alpha {options.alpha}: it must be > 0 and finite; 1e-2 is usual")
    dataset = data.load(options.data, options.data_dir, train_size=options.train_size)
    report.writable(options.out)
    network = options.model or DEFAULTS[options.data].get("model", Config().model)
    sizes = {"size": dataset.size, "channels": dataset.channels, "classes": data.CLASSES}
    model = build_model(network, **sizes, seed=options.seed).to(options.device)
    if options.epochs:
        _train(model, dataset, options)
    config = Config(batch_size=options.batch_size, device=options.device)
    images, labels = next(batches(dataset.train, config, options.seed, options.epochs))
    found = inspection.inspect(model, images, labels, alpha=options.alpha)
    layers = None if options.layers is None else [name.strip() for name in options.layers.split(",")]
    title = f"{network} on {options.data} after {options.epochs} epochs with {options.optimizer}, {len(labels)} samples"
    inspection.draw(found, options.out / PICTURE, title=title, layers=layers)
    _write(found, options)
    _print(found, title)
    print(f"wrote {options.out / PICTURE} and {options.out / FIGURES}")
    return 0


def _train(model: torch.nn.Module, dataset: data.Dataset, options: argparse.Namespace) -> None:
    from rich.progress import track

    steps = -(-len(dataset.train.labels) // options.batch_size)
    config = Config(batch_size=options.batch_size, device=options.device, epochs=options.epochs, alpha=options.alpha)
    optimizer, scheduler = build_optimizer(options.optimizer, model, config, steps_per_epoch=steps)
    for epoch in range(options.epochs):
        words = f"epoch {epoch + 1}/{options.epochs}"
        for images, labels in track(batches(dataset.train, config, options.seed, epoch), words, steps):
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    if hasattr(optimizer, "remove"):
        optimizer.remove()


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
    (options.out / FIGURES).write_text(text + "\n")


def _print(found: inspection.Inspection, title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("\nlayer", no_wrap=True)
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for layer, figures in found.diagnostics.items():
        table.add_row(layer or "(the model)", *(f"{figures[name]:.3g}" for name in COLUMNS))
    Console().print(table)
