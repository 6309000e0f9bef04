"""What is measured of our own: plain steps to compare with, optimiser steps, and every per-sample quantity.

A variant prepares a `Step` for a task that is its own; the step is what is timed. It returns the quantity itself,
so that every peer's can be compared with ours, or None for optimiser steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

import fngd
import persample
from benchmarks.models import Task
from persample.projections import Kronecker

LR, MOMENTUM, STEPS_PER_EPOCH, MAX_NORM = 1e-4, 0.9, 8, 1.0
DIRECTIONS, SAMPLES, OUTPUTS = 16, 4, 10
OPTIONS: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "batch_axis": 0}  # with T = B no shape tells the axis
OURS = "ours"

STEPS = ("plain", "stored", "coefficient", "ngd", "compiled")
"""What needs no gradient of a sample of its own."""


@dataclass(frozen=True)
class Step:
    """What is timed, what clears up after it, unmeasured, and how many calls come before the first timed one."""

    run: Callable[[], Any]
    clear: Callable[[], None] = lambda: None
    warmup: int = 3


@dataclass(frozen=True)
class Variant:
    """One thing to measure."""

    key: str
    what: str
    label: str
    prepare: Callable[[Task], Step]
    library: str = OURS
    package: str = "persample"
    module: str = "persample"
    """As Python imports it."""
    reference: str = "plain"
    """Key of the variant that it is compared with."""
    limit: str | None = None
    """Key of the variant that writes the result's bytes and does nothing else."""


VARIANTS: dict[str, Variant] = {}


def variant(key: str, what: str, label: str, **more: Any) -> Callable[[Callable[[Task], Step]], Callable[[Task], Step]]:
    """Registers a function that prepares a step."""

    def add(prepare: Callable[[Task], Step]) -> Callable[[Task], Step]:
        VARIANTS[key] = Variant(key, what, label, prepare, **more)
        return prepare

    return add


def training(task: Task, optimizer: Optimizer, *, compiled: bool = False) -> Callable[[], None]:
    """Returns the step of the loop that everybody has."""
    model = torch.compile(task.model) if compiled else task.model

    def step() -> None:
        task.loss_fn(model(task.inputs), task.targets).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sgd(task: Task) -> Optimizer:
    return SGD(task.model.parameters(), lr=LR, momentum=MOMENTUM)


@variant("plain", "plain", "plain step")
def plain(task: Task) -> Step:
    """Forward, backward, SGD."""
    return Step(training(task, _sgd(task)))


def stored_optimizer(task: Task) -> fngd.FNGD:
    """FNGD that computes coefficients in `STEPS_PER_EPOCH` steps and never again."""
    return fngd.FNGD(task.model, steps_per_epoch=STEPS_PER_EPOCH, **OPTIONS)


@variant("stored", "stored", "FNGD, stored coefficients")
def stored(task: Task) -> Step:
    """A step of any epoch but the first."""
    return Step(training(task, stored_optimizer(task)), warmup=STEPS_PER_EPOCH + 2)


@variant("coefficient", "coefficient", "FNGD, computing coefficients")
def coefficient(task: Task) -> Step:
    """A step of the first epoch: Gram, solve, weighted sum, update."""
    optimizer = fngd.FNGD(task.model, steps_per_epoch=STEPS_PER_EPOCH, refresh_epochs=1, **OPTIONS)
    return Step(training(task, optimizer))


@variant("ngd", "ngd", "NGD")
def ngd(task: Task) -> Step:
    """The same without a table."""
    return Step(training(task, fngd.NGD(task.model, **OPTIONS)))


@variant("plain_compiled", "compiled", "plain step, compiled")
def plain_compiled(task: Task) -> Step:
    """torch.compile of the model."""
    return Step(training(task, _sgd(task), compiled=True))


@variant("stored_compiled", "compiled", "FNGD, stored coefficients, compiled", reference="plain_compiled")
def stored_compiled(task: Task) -> Step:
    """The same with coefficients."""
    return Step(training(task, stored_optimizer(task), compiled=True), warmup=STEPS_PER_EPOCH + 2)


# --- per-sample quantities ----------------------------------------------------------------------------------


def captured(task: Task, hold: str = "factors") -> Any:
    """With the options that a user gets who gives none, but for `hold`."""
    return persample.per_sample(task.model, task.loss_fn, task.inputs, task.targets, hold=hold)


@variant("capture", "capture", "per_sample(...) alone")
def capture(task: Task) -> Step:
    """Forward, backward to the outputs, attribution by plan, factors."""
    return Step(lambda: captured(task) and None)


@variant("grads", "grads", "grads()", limit="write")
def grads(task: Task) -> Step:
    """From the third call on where earlier results lay, which are dropped between calls as those of peers are."""
    return Step(lambda: captured(task).grads())


@variant("grads_out", "grads", "grads(out=…)", limit="write")
def grads_out(task: Task) -> Step:
    """Into the memory of the call before."""
    buffers = dict(empty_rows(task))
    return Step(lambda: captured(task).grads(out=buffers))


@variant("norms", "norms", "norms()")
def norms(task: Task) -> Step:
    """Over all parameters."""
    return Step(lambda: captured(task).norms())


@variant("norms_graph", "norms", 'norms(), hold="graph"')
def norms_graph(task: Task) -> Step:
    """Each layer's factors consumed on the way."""
    return Step(lambda: captured(task, "graph").norms())


@variant("gram", "gram", "gram()")
def gram(task: Task) -> Step:
    """Over all parameters."""
    return Step(lambda: captured(task).gram())


@variant("gram_graph", "gram", 'gram(), hold="graph"')
def gram_graph(task: Task) -> Step:
    """The same."""
    return Step(lambda: captured(task, "graph").gram())


@variant("clipped_sum", "clipped_sum", "clipped_sum()")
def clipped_sum(task: Task) -> Step:
    """Norm at most 1."""
    return Step(lambda: captured(task).clipped_sum(MAX_NORM))


@variant("norms_step", "norms_step", "norms(), backward(c), SGD")
def norms_step(task: Task) -> Step:
    """One capture for the norm over all parameters and the step."""
    optimizer = _sgd(task)

    def run() -> None:
        psg = captured(task)
        psg.backward((MAX_NORM / psg.norms()).clamp(max=1) / task.batch)
        optimizer.step()
        optimizer.zero_grad()

    return Step(run)


def directions(task: Task) -> dict[str, Tensor]:
    """`DIRECTIONS` random vectors of each parameter's shape, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    each = task.model.named_parameters()
    return {n: torch.randn(DIRECTIONS, *p.shape, generator=generator).to(p.device) for n, p in each}


@variant("dot", "dot", "dot(vectors)")
def dot(task: Task) -> Step:
    """All directions at once."""
    vectors = directions(task)
    return Step(lambda: captured(task).dot(vectors))


@variant("project", "project", "project(Kronecker(16, 16))")
def project(task: Task) -> Step:
    """Over all parameters."""
    projection = Kronecker(16, 16)
    return Step(lambda: captured(task).project(projection))


@variant("sum_of_squares", "sum_of_squares", "sum_of_squares()")
def sum_of_squares(task: Task) -> Step:
    """Of every parameter."""
    return Step(lambda: captured(task).sum_of_squares())


def some_outputs(outputs: Tensor) -> Tensor:
    """The first `OUTPUTS` numbers of each sample."""
    return outputs.flatten(1)[:, :OUTPUTS]


def jacobian_of(task: Task) -> persample.Jacobian:
    """Of some samples and outputs: of all of them the rows would not fit anywhere."""
    return persample.jacobian(task.model, task.inputs[:SAMPLES], output_fn=some_outputs)


@variant("jacobian", "jacobian", "jacobian(…).rows()")
def jacobian(task: Task) -> Step:
    """Of some samples and outputs."""
    return Step(lambda: jacobian_of(task).rows())


@variant("kernel", "kernel", "jacobian(…).gram()")
def kernel(task: Task) -> Step:
    """Over all parameters."""
    return Step(lambda: jacobian_of(task).gram())


# --- the limit: as many bytes, written and nothing else -----------------------------------------------------


def empty_rows(task: Task) -> Iterator[tuple[str, Tensor]]:
    """Memory for the gradient of every sample, parameter by parameter."""
    for name, parameter in task.model.named_parameters():
        yield name, parameter.new_empty(task.batch, *parameter.shape, requires_grad=False).detach()


def rows_nbytes(task: Task) -> int:
    """Bytes of all per-sample gradients."""
    return task.batch * sum(parameter.nbytes for parameter in task.model.parameters())


@variant("write_fresh", "grads", "writing as many bytes, fresh memory")
def write_fresh(task: Task) -> Step:
    """Every page is touched for the first time."""

    def run() -> None:
        _kept = [rows.fill_(1.0) for _, rows in empty_rows(task)]

    return Step(run)


@variant("write", "grads", "writing as many bytes")
def write(task: Task) -> Step:
    """Memory that was touched before."""
    buffers = [rows for _, rows in empty_rows(task)]

    def run() -> None:
        for rows in buffers:
            rows.fill_(1.0)

    return Step(run)
