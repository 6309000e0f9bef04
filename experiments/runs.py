"""One training run, epoch by epoch, for `experiments.images` and `experiments.translation`.

A run can be stopped at any batch; it goes on from the last finished epoch with the same numbers, because all that is
random within an epoch follows from the seed and the epoch's number. Training alone is timed: batches are made, and
models tested, while the clocks stand still. Process seconds (the CPU time of all threads) hardly depend on what else
the machine does; wall seconds do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.record import Context, Result
from fngd.training.steps import optimizer_step, set_mode


@dataclass(frozen=True)
class Plan:
    """What to train with.

    batches(epoch) gives an epoch's batches, loss(batch) (mean loss of the batch, how many it is the mean of),
    factor(step) what the learning rate is multiplied with, test() an epoch's figures.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Callable[[int], Iterable[Any]]
    loss: Callable[[Any], tuple[Tensor, float]]
    factor: Callable[[int], float]
    test: Callable[[], dict[str, float]]
    epochs: int
    steps: int  # in an epoch
    seed: int = 0


def train(plan: Plan, context: Context) -> Result:
    """Trains from the last checkpoint on.

    Returns "epochs", a list of figures: train_loss (mean over the epoch), seconds (wall), process_seconds, and what
    `test` returns; and "diverged": a loss was not finite, and the run ended there. Raises Stopped where asked to.
    """
    scheduler = torch.optim.lr_scheduler.LambdaLR(plan.optimizer, plan.factor)
    history: list[dict[str, float]] = []
    state = context.load()
    if state is not None:
        plan.model.load_state_dict(state["model"])
        plan.optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict({**scheduler.state_dict(), **state["scheduler"]})
        history = state["history"]
    diverged = False
    for epoch in range(len(history), plan.epochs):
        torch.manual_seed(1_000_003 * plan.seed + epoch)  # dropout
        loss, seconds, process_seconds = _epoch(plan, scheduler, epoch, context)
        diverged = not loss.isfinite()
        figures = {"train_loss": loss.item(), "seconds": seconds, "process_seconds": process_seconds}
        if diverged:
            history.append(figures)
            break
        plan.model.eval()
        set_mode(plan.optimizer, training=False)
        with torch.no_grad():
            history.append({**figures, **plan.test()})
        context.save(
            {
                "model": plan.model.state_dict(),
                "optimizer": plan.optimizer.state_dict(),
                "scheduler": {"last_epoch": scheduler.last_epoch},
                "history": history,
            }
        )
    if hasattr(plan.optimizer, "remove"):
        plan.optimizer.remove()
    return {"epochs": history, "diverged": bool(diverged)}


def _epoch(plan: Plan, scheduler: Any, epoch: int, context: Context) -> tuple[Tensor, float, float]:
    plan.model.train()
    set_mode(plan.optimizer, training=True)
    total = torch.zeros((), device=context.device, dtype=torch.float64)
    count, seconds, process_seconds = 0.0, 0.0, 0.0
    for step, batch in enumerate(plan.batches(epoch)):
        _wait(context.device)
        wall, process = time.perf_counter(), time.process_time()
        loss, weight = _step(plan, batch)
        scheduler.step()
        _wait(context.device)
        seconds += time.perf_counter() - wall
        process_seconds += time.process_time() - process
        total += loss * weight
        count += weight
        context.progress(epoch * plan.steps + step + 1, plan.epochs * plan.steps)
        if not total.isfinite():
            break
    return total / max(count, 1), seconds, process_seconds


def _step(plan: Plan, batch: Any) -> tuple[Tensor, float]:
    weights: list[float] = []

    def loss() -> Tensor:
        value, weight = plan.loss(batch)
        weights.append(weight)
        return value

    return optimizer_step(plan.optimizer, loss), weights[0]


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def first_epoch(epochs: list[dict[str, Any]], figure: str, target: float) -> int | None:
    """Returns after how many epochs a figure is at least the target for the first time, None if never.

    >>> first_epoch([{"accuracy": 50.0}, {"accuracy": 70.0}], "accuracy", 60)
    2
    """
    for number, entry in enumerate(epochs, 1):
        if entry.get(figure) is not None and entry[figure] >= target:
            return number
    return None


def spent(epochs: list[dict[str, Any]], count: int | None, clock: str = "process_seconds") -> float | None:
    """Returns the seconds of training in the first `count` epochs, None for None.

    >>> spent([{"process_seconds": 2.0}, {"process_seconds": 1.0}], 2)
    3.0
    """
    return None if count is None else sum(entry[clock] for entry in epochs[:count])
