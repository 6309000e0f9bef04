"""Trains several optimisers side by side, batch by batch, so that their times can be compared.

All start from the same weights and see the same batches; within a batch they take turns, in an order that
rotates, so that whatever else the machine does falls on all of them alike. A run can be stopped after any
batch and goes on from there with the same numbers.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fngd.training.data import Dataset, Split, augment
from fngd.training.models import build_model
from fngd.training.recipes import build_optimizer
from fngd.training.settings import Config
from fngd.training.steps import optimizer_step, set_mode

CHECKPOINT_SECONDS = 60.0


@dataclass
class Progress:
    """What is reported after every batch."""

    seed: int
    epoch: int
    batch: int
    steps_per_epoch: int
    losses: dict[str, float]


class Runner:
    """One optimiser with its model; sums up the epoch's training loss and seconds."""

    def __init__(self, name: str, config: Config, dataset: Dataset, seed: int) -> None:
        self.name, self.config = name, config
        steps = math.ceil(len(dataset.train.labels) / config.batch_size)
        sizes = {"size": dataset.size, "channels": dataset.channels, "classes": dataset.classes}
        self.model = build_model(config.model, **sizes, seed=seed).to(config.device)
        self.optimizer, self.scheduler = build_optimizer(name, self.model, config, steps_per_epoch=steps)
        self.total, self.count, self.seconds = torch.zeros((), device=config.device), 0, 0.0

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Trains on one batch and takes its time."""
        self.model.train()
        _wait(self.config.device)
        start = time.perf_counter()
        set_mode(self.optimizer, training=True)
        loss = optimizer_step(self.optimizer, lambda: F.cross_entropy(self.model(images), labels))
        _wait(self.config.device)
        self.seconds += time.perf_counter() - start
        self.scheduler.step()
        self.total += loss * len(labels)
        self.count += len(labels)

    def end_epoch(self, test: Split) -> dict[str, float]:
        """Returns the epoch's figures and starts the next one."""
        set_mode(self.optimizer, training=False)
        test_loss, accuracy = evaluate(self.model, test)
        figures = {
            "train_loss": (self.total / max(1, self.count)).item(),
            "test_loss": test_loss,
            "test_accuracy": accuracy,
            "seconds": self.seconds,
        }
        self.total.zero_()
        self.count, self.seconds = 0, 0.0
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "sums": (self.total, self.count, self.seconds),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **state["scheduler"]})
        total, self.count, self.seconds = state["sums"]
        self.total.copy_(total)


@torch.no_grad()
def evaluate(model: torch.nn.Module, split: Split, batch_size: int = 512) -> tuple[float, float]:
    """Returns (mean loss, accuracy in per cent) in evaluation mode."""
    model.eval()
    loss, correct = 0.0, 0
    for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True):
        logits = model(images)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(1) == labels).sum())
    return loss / len(split.labels), 100 * correct / len(split.labels)


def batches(split: Split, config: Config, seed: int, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the shuffled batches of an epoch from batch `start` on; the same for every optimiser and run."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(len(split.labels), generator=generator)
    for number, chosen in enumerate(order.split(config.batch_size)):
        images, labels = split.images[chosen], split.labels[chosen]
        if config.augment:
            images = augment(images, generator)  # also for skipped batches: the random numbers go on
        if number >= start:
            yield images.to(config.device), labels.to(config.device)


@dataclass
class Comparison:
    """A comparison in progress: what is finished, and where it stands.

    history[name][seed] is a list with one dict per finished epoch: train_loss (mean over the epoch's
    batches), test_loss, test_accuracy (per cent), seconds (training alone).
    """

    config: Config
    history: dict[str, dict[int, list[dict[str, float]]]] = field(default_factory=dict)
    memory: dict[str, float | None] = field(default_factory=dict)
    position: tuple[int, int, int] = (0, 0, 0)  # index of the seed, epoch, batch
    states: dict[str, Any] = field(default_factory=dict)  # the runners', between batches of a seed

    @property
    def finished(self) -> bool:
        """Whether all seeds are trained."""
        return self.position[0] >= len(self.config.seeds)

    def train(
        self,
        dataset: Dataset,
        *,
        stop: Callable[[], bool] = lambda: False,
        report: Callable[[Progress], None] = lambda progress: None,
        save: Callable[[Comparison], None] = lambda comparison: None,
    ) -> bool:
        """Trains from where it stands; returns False if `stop()` said to stop, which is asked after every
        batch.

        report is called after every batch, save after every epoch, every minute and before stopping.
        """
        config, saved = self.config, time.monotonic()
        test = Split(dataset.test.images.to(config.device), dataset.test.labels.to(config.device))
        for index in range(self.position[0], len(config.seeds)):
            seed = config.seeds[index]
            runners = [Runner(name, config, dataset, seed) for name in config.optimizers]
            for runner in runners:
                self.history.setdefault(runner.name, {}).setdefault(seed, [])
                if self.states:
                    runner.load_state_dict(self.states[runner.name])
            for epoch in range(self.position[1], config.epochs):
                steps = math.ceil(len(dataset.train.labels) / config.batch_size)
                first = self.position[2]
                for number, (images, labels) in enumerate(batches(dataset.train, config, seed, epoch, first), first):
                    turn = number % len(runners)
                    for runner in runners[turn:] + runners[:turn]:
                        runner.step(images, labels)
                    if number + 1 < steps:
                        self.position = index, epoch, number + 1
                    else:
                        self.position = index, epoch + 1, 0
                        for runner in runners:
                            self.history[runner.name][seed].append(runner.end_epoch(test))
                    losses = {runner.name: self._last_loss(runner) for runner in runners}
                    report(Progress(seed, epoch, number, steps, losses))
                    stopping = stop()
                    if stopping or number + 1 == steps or time.monotonic() - saved > CHECKPOINT_SECONDS:
                        self.states = {runner.name: runner.state_dict() for runner in runners}
                        save(self)
                        saved = time.monotonic()
                    if stopping:
                        return False
            for runner in runners:
                if hasattr(runner.optimizer, "remove"):
                    runner.optimizer.remove()
            self.position, self.states = (index + 1, 0, 0), {}
        save(self)
        return True

    def _last_loss(self, runner: Runner) -> float:
        epochs = [entry for entries in self.history[runner.name].values() for entry in entries[-1:]]
        return epochs[-1]["train_loss"] if epochs else math.nan

    def save(self, path: Path) -> None:
        """Writes a checkpoint; an interruption in the middle leaves the previous one."""
        content = {
            "config": self.config.to_json(),
            "history": self.history,
            "memory": self.memory,
            "position": self.position,
            "states": self.states,
        }
        partial = path.with_suffix(".partial")
        torch.save(content, partial)
        os.replace(partial, path)

    @staticmethod
    def load(path: Path) -> Comparison:
        """Returns a saved comparison. Raises ValueError where the file is none."""
        try:
            content = torch.load(path, weights_only=True)
            config = Config.from_json(content["config"])
            position, states = tuple(content["position"]), content["states"]
            return Comparison(config, content["history"], content["memory"], position, states)
        except Exception as error:  # a broken file can raise anything
            raise ValueError(f"{path} is no checkpoint of this program: {error}") from error


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
