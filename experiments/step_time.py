"""Time of a training step over that of SGD, for eight methods and AdamW on five models (FNGD paper, Table III, Fig. 8).

Methods do not cost the same in every step, so each has kinds of steps that are timed apart and put together in the
shares of the paper's settings:

kfac, shampoo   90 plain steps, 9 with new statistics, 1 with new statistics and inverses (every 10 and 100 steps)
skfac           1 step in 8 with new factors and inverses, the others plain (48 times in an epoch of 391 steps)
fngd            1 epoch that computes coefficients, the others with stored ones, of `epochs` in all
the others      all steps alike

All methods of a model run in turns: each round makes one step of each kind, in an order drawn anew, and ratios are
taken within the round. Steps with decompositions that take minutes are timed `rare` times, or only when they are met
first (rare = 0); their median then enters every round. Data are random: they make no difference to time. A unit is a
model in one fresh process; medians are taken over the rounds of several (why: `experiments.fresh`).
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from experiments.fresh import Show, in_fresh_process
from experiments.models import Transformer
from experiments.record import Context, Experiment, Result, Settings
from experiments.regions import breakdown
from experiments.step_time_claims import CLAIMS
from experiments.step_time_ratios import shares
from experiments.step_time_report import draw, report
from fngd import FNGD, KFAC, NGD, SKFAC, Eva, Shampoo
from fngd.training.models import build_model
from persample.testing.machine import quiet

METHODS = ("sgd", "adamw", "kfac", "shampoo", "eva", "skfac", "ngd", "fngd")
MODELS = ("resnet32", "resnet110", "resnet18", "resnet34", "transformer")
STEPS = 391
"""Steps of an epoch of 50,000 images in batches of 128."""
_TEXT = {"words": 8000, "time": 16, "width": 512, "hidden": 2048, "heads": 8}
FULL: Settings = {
    "models": MODELS,
    "methods": METHODS,
    "batch": {name: 64 if name == "transformer" else 128 for name in MODELS},
    "processes": dict.fromkeys(MODELS, 3),
    "rounds": dict.fromkeys(MODELS, 5),
    "rare": dict.fromkeys(MODELS, 1),
    "breakdowns": 2,
    "epochs": 100,
    "transformer": {**_TEXT, "layers": 6},
    "image": 32,
}
SMALL: Settings = {
    **FULL,
    "batch": {"resnet32": 128, "resnet110": 64, "resnet18": 32, "resnet34": 32, "transformer": 64},
    "processes": {"resnet32": 5, "resnet110": 3, "resnet18": 2, "resnet34": 2, "transformer": 3},
    "rounds": {"resnet32": 6, "resnet110": 4, "resnet18": 4, "resnet34": 4, "transformer": 5},
    "rare": {"resnet32": 1, "resnet110": 1, "resnet18": 0, "resnet34": 0, "transformer": 0},
    "breakdowns": 1,
    "transformer": {**_TEXT, "layers": 2},
}
SMOKE: Settings = {
    **FULL,
    "models": ["resnet32", "transformer"],
    "processes": {"resnet32": 1, "transformer": 1},
    "batch": {"resnet32": 4, "transformer": 4},
    "rounds": {"resnet32": 2, "transformer": 2},
    "rare": {"resnet32": 0, "transformer": 0},
    "breakdowns": 1,
    "transformer": {"words": 200, "time": 5, "width": 128, "hidden": 512, "heads": 8, "layers": 1},
    "image": 16,
}
LR = 1e-4
"""Small, so that nothing diverges on random data and meets NaN or denormals, which take other times."""


def optimizer(method: str, model: nn.Module) -> Optimizer:
    """Returns the method in the paper's setting; KFAC leaves the output layer of a Transformer out, as is usual."""
    options: dict[str, Any] = {"lr": LR, "momentum": 0.9, "weight_decay": 5e-4}
    if method == "kfac":
        out = [*model.out.parameters()] if isinstance(model, Transformer) else []
        rest = [parameter for parameter in model.parameters() if all(parameter is not other for other in out)]
        groups = [{"params": rest}] + ([{"params": out, "precondition": False}] if out else [])
        return KFAC(model, groups, statistics_every=10, inverse_every=100, batch_axis=0, **options)
    # batch_axis: a batch of sentences may be as long as the sentences, and which axis is which is not left to chance.
    build: dict[str, Callable[[], Optimizer]] = {
        "sgd": lambda: SGD(model.parameters(), **options),
        "adamw": lambda: AdamW(model.parameters(), lr=LR, weight_decay=0.01),
        "shampoo": lambda: Shampoo(model.parameters(), statistics_every=10, inverse_every=100, **options),
        "eva": lambda: Eva(model, batch_axis=0, **options),
        "skfac": lambda: SKFAC(model, every=STEPS // 48, batch_axis=0, **options),
        "ngd": lambda: NGD(model, batch_axis=0, **options),
        "fngd": lambda: FNGD(model, steps_per_epoch=STEPS, batch_axis=0, **options),
    }
    return build[method]()


def turn_to(optimizer: Any, kind: str) -> None:
    """Makes the next step of the optimiser one of that kind."""
    if isinstance(optimizer, FNGD):
        table = optimizer._sharing()
        table.index, table.epoch = 0, 0 if kind == "compute" else 1
    elif kind in ("plain", "statistics", "inverse"):
        # Multiples of 100, and for SKFAC of 8, are the steps with everything; 10 has KFAC's statistics alone.
        optimizer._completed = {"inverse": 0, "plain": 1, "statistics": 10}[kind]


def task(name: str, settings: Settings, device: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Returns a model and a function that computes its loss on a batch; the same at every call."""
    batch = settings["batch"][name]
    generator = torch.Generator().manual_seed(0)
    if name == "transformer":
        own = settings["transformer"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = {name: own[name] for name in ("width", "hidden", "heads", "layers")}
            model: nn.Module = Transformer(own["words"], own["words"], **sizes)
        words = torch.randint(1, own["words"], (3, batch, own["time"]), generator=generator).to(device)
        source, target, labels = words
        return model.to(device), lambda net: F.cross_entropy(
            net(source, target).flatten(0, 1), labels.flatten(), label_smoothing=0.1
        )
    classes = 100 if name in ("resnet18", "resnet34") else 10
    model = build_model(name, size=settings["image"], channels=3, classes=classes).to(device)
    images = torch.randn(batch, 3, settings["image"], settings["image"], generator=generator).to(device)
    numbers = torch.randint(classes, (batch,), generator=generator).to(device)
    return model, lambda net: F.cross_entropy(net(images), numbers)


def units(settings: Settings) -> list[str]:
    """Every model in each of the processes."""
    return [
        f"{model}/process={number}" for model in settings["models"] for number in range(settings["processes"][model])
    ]


def run(unit: str, settings: Settings, context: Context) -> Result:
    """Times all methods on one model, in a fresh process."""
    name, _, number = unit.partition("/process=")
    return in_fresh_process(measure, name, int(number), settings, context.device, show=context.progress)


def measure(name: str, place: int, settings: Settings, device: str, show: Show) -> Result:
    """Times all methods on one model, in this process, which is that many'th."""
    steps = [(m, kind) for m in settings["methods"] for kind in shares(m, settings["epochs"])]
    rounds, rare, extra = settings["rounds"][name], settings["rare"][name], settings["breakdowns"]
    total, done = len(steps) * (1 + rounds + extra), 0
    trained: dict[str, tuple[nn.Module, Optimizer, Callable[[nn.Module], Tensor]]] = {}
    first: dict[str, list[float]] = {}
    times: dict[str, dict[str, list[float]]] = {}
    parts: dict[str, list[dict[str, float]]] = {}
    for method in settings["methods"]:
        model, loss = task(name, settings, device)
        trained[method] = model, optimizer(method, model), loss

    def tick(text: str) -> None:
        nonlocal done
        done += 1
        show(done, total, text)

    with quiet():
        for method, kind in sorted(steps, key=lambda step: _order(step[1])):  # decompositions before what uses them
            first[f"{method}/{kind}"] = _step(*trained[method], kind, device)
            tick(f"first {method}, {kind}")
        for number in range(rounds):
            order = list(steps)
            random.Random(place * rounds + number).shuffle(order)
            gc.collect()
            for method, kind in order:
                tick(f"round {number + 1}, {method}")
                if _rare(method, kind) and number >= rare:
                    continue
                wall, process = _step(*trained[method], kind, device)
                entry = times.setdefault(f"{method}/{kind}", {"round": [], "wall": [], "process": []})
                entry["round"].append(number)
                entry["wall"].append(wall)
                entry["process"].append(process)
        for number in range(extra):
            for method, kind in steps:
                tick(f"parts {number + 1}, {method}")
                if _rare(method, kind) and number >= max(1, rare):
                    continue
                if _rare(method, kind) and not rare and first[f"{method}/{kind}"][0] > 10:
                    continue  # minutes, for a figure that the difference to the step with statistics shows as well
                turn_to(trained[method][1], kind)
                parts.setdefault(f"{method}/{kind}", []).append(breakdown(*trained[method], device))
    for _, opt, _ in trained.values():
        if hasattr(opt, "remove"):
            opt.remove()
    for key, (wall, process) in first.items():
        times.setdefault(
            key, {"round": [], "wall": [wall], "process": [process]}
        )  # rare = 0: the first is all there is
    parameters = sum(parameter.numel() for parameter in trained["sgd"][0].parameters())
    return {"parameters": parameters, "batch": settings["batch"][name], "times": times, "parts": parts}


def _order(kind: str) -> int:
    return ("inverse", "compute").index(kind) if kind in ("inverse", "compute") else 2


def _rare(method: str, kind: str) -> bool:
    return kind == "inverse" and method in ("kfac", "shampoo")


def _step(model: nn.Module, opt: Optimizer, loss: Callable[[nn.Module], Tensor], kind: str, device: str) -> list[float]:
    """Makes one step; returns [wall, process] seconds."""
    turn_to(opt, kind)
    _wait(device)
    start = time.perf_counter(), time.process_time()
    loss(model).backward()
    opt.step()
    opt.zero_grad()
    _wait(device)
    return [time.perf_counter() - start[0], time.process_time() - start[1]]


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


EXPERIMENT = Experiment(
    name="step_time",
    help="time of a step over SGD's, in parts; eight methods, five models",
    source="FNGD paper, Table III and Fig. 8",
    scales={"small": SMALL, "full": FULL, "smoke": SMOKE},
    units=units,
    run=run,
    report=report,
    draw=draw,
    claims=CLAIMS,
    growing=("models", "processes"),
)
