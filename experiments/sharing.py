"""Does sharing coefficients hurt? NGD, FNGD and its controls for several α (FNGD paper, Section IV-B and Fig. 4).

constant    all factors 1: SGD by FNGD's code; does not depend on α
ngd         fresh coefficients in every step
fngd        those of the first epoch, by position in the batch: the paper's rule
permuted    every computed vector permuted at random, layer by layer, before use: the same numbers for other samples
sample      those of the first epoch, by sample: what the paper's argument would support
refreshed   as fngd, computed anew in every `refresh_epochs`-th epoch

All methods of a seed start from the same weights and see the same batches, at the same learning rate and schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.record import Context, Experiment, Result, Settings
from experiments.sharing_report import CLAIMS, draw, parsed, report
from fngd import FNGD, NGD, smw_coefficients
from fngd.training import data
from fngd.training.loop import evaluate
from fngd.training.models import build_model
from fngd.training.recipes import SCHEDULES
from persample import LayerGrads
from persample.reweighting import Policy

METHODS = ("constant", "ngd", "fngd", "permuted", "sample", "refreshed")
ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
COMMON: Settings = {"alphas": ALPHAS, "methods": METHODS, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "step"}
SMALL: Settings = {
    **COMMON,
    "data": "fashion-mnist",
    "train_size": 4096,
    "test_size": 4096,
    "model": "cnn",
    "augment": False,
    "batch_size": 128,
    "epochs": 10,
    "lr": 0.05,
    "refresh_epochs": 3,
    "seeds": [0, 1, 2],
}
FULL: Settings = {
    **SMALL,
    "data": "cifar10",
    "train_size": None,
    "test_size": None,
    "model": "resnet32",
    "augment": True,
    "epochs": 100,
    "lr": 0.1,
    "refresh_epochs": 10,
}
SMOKE: Settings = {
    **SMALL,
    "data": "digits",
    "train_size": 512,
    "test_size": None,
    "epochs": 3,
    "alphas": [1e-3, 1e-1],
    "refresh_epochs": 2,
    "seeds": [0],
}


def units(settings: Settings) -> list[str]:
    """One run each; seeds outermost, so that an interrupted experiment is complete for the first ones."""
    return [
        name
        for seed in settings["seeds"]
        for method in settings["methods"]
        for name in (
            [f"{method}/seed={seed}"]
            if method == "constant"
            else [f"{method}/alpha={alpha:g}/seed={seed}" for alpha in settings["alphas"]]
        )
    ]


def optimizer(
    method: str, model: nn.Module, alpha: float | None, settings: Settings, steps: int, samples: int
) -> NGD | FNGD:
    """Returns the optimiser of a unit."""
    common: dict[str, Any] = {name: settings[name] for name in ("lr", "momentum", "weight_decay")}
    if method == "ngd":
        return NGD(model, alpha=alpha, **common)
    special: dict[str, dict[str, Any]] = {
        "constant": {"control": "constant"},
        "fngd": {"alpha": alpha},
        "permuted": {"alpha": alpha, "control": "permuted"},
        "sample": {"alpha": alpha, "share": "sample", "samples": samples},
        "refreshed": {"alpha": alpha, "refresh_epochs": settings["refresh_epochs"]},
    }
    return FNGD(model, steps_per_epoch=steps, **common, **special[method])


class Watch:
    """Looks at the factors that an optimiser uses, and compares stored ones with fresh ones where asked to."""

    def __init__(self, alpha: float | None) -> None:
        self.comparing = False
        self._alpha = alpha
        self._factors: list[tuple[Tensor, Tensor]] = []
        self._likeness: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, policy: Policy) -> Policy:
        """Returns the policy, watched."""

        def watched(layer: str, grads: LayerGrads) -> Tensor:
            used = policy(layer, grads)
            self._factors.append((used.mean(), used.std(correction=0)))
            if self.comparing:
                gram = grads.gram() * grads.batch_size**2  # of the samples' own gradients: the loss is a mean
                self._likeness[layer] = likeness(used, smw_coefficients(gram, alpha=self._alpha))
            return used

        return watched

    def figures(self) -> Result:
        """Returns the epoch's figures and starts anew."""
        means, stds = (torch.stack(each).mean().item() for each in zip(*self._factors, strict=True))
        result: Result = {"factor_mean": means, "factor_std": stds}
        if self._likeness:
            result["cosine"] = {layer: pair[0].item() for layer, pair in self._likeness.items()}
            result["correlation"] = {layer: pair[1].item() for layer, pair in self._likeness.items()}
        self._factors.clear()
        self._likeness.clear()
        return result


def likeness(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (cosine, correlation). Factors have a mean near 1, so the cosine is near 1 whatever they do; the
    correlation, which is the cosine after both means are taken off, tells whether it is the same samples that weigh."""
    centred = first - first.mean(), second - second.mean()
    return F.cosine_similarity(first, second, dim=0), F.cosine_similarity(*centred, dim=0)


def batches(split: data.Split, settings: Settings, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields (ids, images, labels), the same for every method."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    for ids in torch.randperm(len(split.labels), generator=generator).split(settings["batch_size"]):
        images = split.images[ids]
        yield ids, data.augment(images, generator) if settings["augment"] else images, split.labels[ids]


def run(unit: str, settings: Settings, context: Context) -> Result:
    """Trains; returns a list of figures by epoch."""
    method, alpha, seed = parsed(unit)
    dataset = data.load(settings["data"], context.data_dir, train_size=settings["train_size"])
    test = data.Split(*(part[: settings["test_size"]].to(context.device) for part in vars(dataset.test).values()))
    sizes = {"size": dataset.size, "channels": dataset.channels, "classes": 10}
    model = build_model(settings["model"], **sizes, seed=seed).to(context.device)
    samples = len(dataset.train.labels)
    steps = math.ceil(samples / settings["batch_size"])
    opt = optimizer(method, model, alpha, settings, steps, samples)
    watch, factor = Watch(alpha), SCHEDULES[settings["schedule"]]
    epochs: list[Result] = []
    state = context.load()
    if state is not None:
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        epochs = state["epochs"]
    for epoch in range(len(epochs), settings["epochs"]):
        model.train()
        total = torch.zeros((), device=context.device)
        reuses = alpha is not None and isinstance(opt, FNGD) and not opt.computing
        with opt.handle.wrapped(watch):
            for number, (ids, images, labels) in enumerate(batches(dataset.train, settings, seed, epoch)):
                for group in opt.param_groups:
                    group["lr"] = settings["lr"] * factor((epoch * steps + number) / (settings["epochs"] * steps))
                if method == "sample":
                    opt.next_batch(ids)  # type: ignore[union-attr]
                watch.comparing = number == 0 and reuses
                loss = F.cross_entropy(model(images.to(context.device)), labels.to(context.device))
                loss.backward()
                opt.step()
                opt.zero_grad()
                total += loss.detach() * len(labels)
                context.progress(epoch * steps + number + 1, settings["epochs"] * steps, f"epoch {epoch + 1}")
        test_loss, accuracy = evaluate(model, test)
        figures = {"train_loss": total.item() / samples, "test_loss": test_loss, "test_accuracy": accuracy}
        epochs.append({**figures, **watch.figures()})
        context.save({"model": model.state_dict(), "optimizer": opt.state_dict(), "epochs": epochs})
    opt.remove()
    return {"epochs": epochs, "finite": math.isfinite(epochs[-1]["train_loss"])}


EXPERIMENT = Experiment(
    name="sharing",
    help="NGD, FNGD and controls: does sharing coefficients hurt",
    source="FNGD paper, Fig. 4",
    scales={"small": SMALL, "full": FULL, "smoke": SMOKE},
    units=units,
    run=run,
    report=report,
    draw=draw,
    claims=CLAIMS,
    growing=("seeds", "alphas", "methods"),
)
