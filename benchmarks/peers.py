"""The same quantities from other libraries, each called as its documentation says, with its fastest options.

Peers get the model that ours get. A library that raises is reported as refused, one whose result differs from ours
as wrong; `persample.testing.peers` holds the adapters for the conformance cases, where set-up and computation are one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import Task
from benchmarks.variants import MAX_NORM, SAMPLES, Step, directions, some_outputs, variant

OPACUS = {"library": "Opacus hooks", "package": "opacus", "module": "opacus"}
GHOST = {"library": "Opacus ghost", "package": "opacus", "module": "opacus"}
EXPANDED = {"library": "ExpandedWeights", "package": "torch", "module": "torch"}
VMAP = {"library": "vmap(grad)", "package": "torch", "module": "torch"}
BACKPACK = {"library": "BackPACK", "package": "backpack-for-pytorch", "module": "backpack"}
TORCHJD = {"library": "TorchJD", "package": "torchjd", "module": "torchjd"}

Rows = Mapping[str, Tensor]


def clear(task: Task) -> Callable[[], None]:
    """Drops what libraries leave on parameters."""

    def drop() -> None:
        for parameter in task.model.parameters():
            parameter.grad = None
            for name in ("grad_sample", "_norm_sample", "grad_batch", "batch_l2", "sum_grad_squared"):
                if hasattr(parameter, name):
                    setattr(parameter, name, None)  # Opacus expects the attribute

    return drop


def attributes(task: Task, name: str) -> dict[str, Tensor]:
    """The attribute of every parameter, by parameter; an error where one has none."""
    found = {key: getattr(parameter, name, None) for key, parameter in task.model.named_parameters()}
    missing = [key for key, value in found.items() if not isinstance(value, Tensor)]
    if missing:
        raise LookupError(f"no {name} for {', '.join(missing)}")
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def rows_norms(rows: Rows) -> Tensor:
    """Norms from gradients, as Opacus' own optimiser forms them."""
    return torch.stack([row.reshape(len(row), -1).norm(2, dim=-1) for row in rows.values()], 1).norm(2, dim=1)


def rows_gram(rows: Rows) -> Tensor:
    """Gram matrix from gradients."""
    flat = [row.reshape(len(row), -1) for row in rows.values()]
    return sum((row @ row.T for row in flat[1:]), flat[0] @ flat[0].T)


def rows_clipped_sum(rows: Rows) -> dict[str, Tensor]:
    """Clipped sum from gradients, as Opacus' own optimiser forms it."""
    factors = (MAX_NORM / (rows_norms(rows) + 1e-6)).clamp(max=1.0)
    return {name: torch.einsum("i,i...", factors, row) for name, row in rows.items()}


def rows_dot(rows: Rows, vectors: Rows) -> Tensor:
    """Inner products with directions from gradients, [B, K]."""
    products = [row.reshape(len(row), -1) @ vectors[name].flatten(1).T for name, row in rows.items()]
    return torch.stack(products).sum(0)


def rows_squares(rows: Rows) -> dict[str, Tensor]:
    """Sums of squares from gradients."""
    return {name: row.square().sum(0) for name, row in rows.items()}


def rows_kernel(rows: Rows) -> Tensor:
    """Inner products of the rows of a Jacobian, [B, C, B, C]."""
    first = next(iter(rows.values()))
    flat = torch.cat([row.flatten(0, 1).flatten(1) for row in rows.values()], 1)
    return (flat @ flat.T).view(*first.shape[:2], *first.shape[:2])


# --- Opacus -------------------------------------------------------------------------------------------------


def _hooks(finish: Callable[[Rows], Any]) -> Callable[[Task], Step]:
    def prepare(task: Task) -> Step:
        from opacus.grad_sample import GradSampleModule

        wrapped = GradSampleModule(task.model, loss_reduction="sum", strict=False)

        def run() -> Any:
            task.loss_fn(wrapped(task.inputs), task.targets).sum().backward()
            return finish(attributes(task, "grad_sample"))

        return Step(run, clear(task))

    return prepare


variant("grads_opacus", "grads", "Opacus hooks", limit="write_fresh", **OPACUS)(_hooks(lambda rows: rows))
variant("norms_opacus", "norms", "Opacus hooks, then norms", **OPACUS)(_hooks(rows_norms))
variant("gram_opacus", "gram", "Opacus hooks, then Gram", **OPACUS)(_hooks(rows_gram))
variant("clipped_sum_opacus", "clipped_sum", "Opacus hooks, clipped", **OPACUS)(_hooks(rows_clipped_sum))


variant("sum_of_squares_opacus", "sum_of_squares", "Opacus hooks, then squares", **OPACUS)(_hooks(rows_squares))


@variant("dot_opacus", "dot", "Opacus hooks, then products", **OPACUS)
def dot_opacus(task: Task) -> Step:
    """Rows, and one product with all directions."""
    vectors = directions(task)
    return _hooks(lambda rows: rows_dot(rows, vectors))(task)


def _ghost(task: Task) -> tuple[Any, Callable[[], Tensor]]:
    """The wrapped model, and the backward pass that leaves norms; the losses it returns keep their graph."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        task.model, loss_reduction="sum", strict=False, max_grad_norm=MAX_NORM, use_ghost_clipping=True
    )

    def first(retain_graph: bool = False) -> Tensor:
        losses = task.loss_fn(wrapped(task.inputs), task.targets)
        losses.sum().backward(retain_graph=retain_graph)
        return losses

    return wrapped, first


@variant("norms_ghost", "norms", "Opacus ghost", **GHOST)
def norms_ghost(task: Task) -> Step:
    """The first of its two backward passes."""
    wrapped, first = _ghost(task)

    def run() -> Tensor:
        first()
        return wrapped.get_norm_sample()

    return Step(run, clear(task))


@variant("clipped_sum_ghost", "clipped_sum", "Opacus ghost clipping", **GHOST)
def clipped_sum_ghost(task: Task) -> Step:
    """What `DPTensorFastGradientClipping.backward` does."""
    wrapped, first = _ghost(task)

    def run() -> dict[str, Tensor]:
        losses = first(retain_graph=True)  # type: ignore[call-arg]
        wrapped.zero_grad(set_to_none=True)
        loss = (wrapped.get_clipping_coef() * losses).sum()
        wrapped.disable_hooks()
        loss.backward()
        wrapped.enable_hooks()
        return attributes(task, "grad")

    return Step(run, clear(task))


# --- torch --------------------------------------------------------------------------------------------------


@variant("grads_expanded", "grads", "ExpandedWeights", limit="write_fresh", **EXPANDED)
def grads_expanded(task: Task) -> Step:
    """torch.nn.utils' own."""
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    def run() -> Rows:
        run_model = call_for_per_sample_grads(task.model, batch_size=task.batch, loss_reduction="sum")
        task.loss_fn(run_model(task.inputs), task.targets).sum().backward()
        return attributes(task, "grad_sample")

    return Step(run, clear(task))


@variant("grads_vmap", "grads", "vmap(grad)", limit="write_fresh", **VMAP)
def grads_vmap(task: Task) -> Step:
    """torch.func, the whole batch at once."""
    from torch.func import functional_call, grad, vmap

    buffers = dict(task.model.named_buffers())
    parameters = {name: parameter.detach() for name, parameter in task.model.named_parameters()}

    def loss(weights: Rows, x: Tensor, target: Tensor) -> Tensor:
        outputs = functional_call(task.model, ({**weights}, buffers), (x[None],))
        return task.loss_fn(outputs, target[None])[0]

    rows = vmap(grad(loss), in_dims=(None, 0, 0))
    return Step(lambda: rows(parameters, task.inputs, task.targets))


def _jacrev(finish: Callable[[Rows], Any]) -> Callable[[Task], Step]:
    def prepare(task: Task) -> Step:
        from torch.func import functional_call, jacrev, vmap

        buffers = dict(task.model.named_buffers())
        parameters = {name: parameter.detach() for name, parameter in task.model.named_parameters()}

        def outputs(weights: Rows, x: Tensor) -> Tensor:
            return some_outputs(functional_call(task.model, ({**weights}, buffers), (x[None],)))[0]

        rows = vmap(jacrev(outputs), in_dims=(None, 0))
        return Step(lambda: finish(rows(parameters, task.inputs[:SAMPLES])))

    return prepare


variant("jacobian_jacrev", "jacobian", "vmap(jacrev)", **VMAP)(_jacrev(lambda rows: rows))
variant("kernel_jacrev", "kernel", "vmap(jacrev), then products", **VMAP)(_jacrev(rows_kernel))


# --- BackPACK, TorchJD --------------------------------------------------------------------------------------


def _backpack(extension: str, attribute: str, finish: Callable[[Rows], Any]) -> Callable[[Task], Step]:
    def prepare(task: Task) -> Step:
        import backpack
        from backpack import extensions

        backpack.extend(task.model)

        def run() -> Any:
            losses = task.losses()
            with backpack.backpack(getattr(extensions, extension)()):
                losses.sum().backward()
            return finish(attributes(task, attribute))

        return Step(run, clear(task))

    return prepare


def _root_of_sum(squares: Rows) -> Tensor:
    return torch.stack(list(squares.values())).sum(0).sqrt()


variant("grads_backpack", "grads", "BackPACK BatchGrad", limit="write_fresh", **BACKPACK)(
    _backpack("BatchGrad", "grad_batch", lambda rows: rows)
)
variant("norms_backpack", "norms", "BackPACK BatchL2Grad", **BACKPACK)(
    _backpack("BatchL2Grad", "batch_l2", _root_of_sum)
)


variant("sum_of_squares_backpack", "sum_of_squares", "BackPACK SumGradSquared", **BACKPACK)(
    _backpack("SumGradSquared", "sum_grad_squared", lambda squares: squares)
)


@variant("gram_torchjd", "gram", "TorchJD autogram", **TORCHJD)
def gram_torchjd(task: Task) -> Step:
    """autogram's Engine."""
    from torchjd.autogram import Engine

    engine = Engine(task.model, batch_dim=0)
    return Step(lambda: torch.as_tensor(engine.compute_gramian(task.losses())), clear(task))
