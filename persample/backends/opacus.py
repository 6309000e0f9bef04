"""Backend `opacus`: per-sample gradients from the Opacus library, in the common form.

Opacus takes dimension 0 of every module's input for the batch, whatever it is, and knows nothing of some options
of the modules it covers. Its rows are therefore compared, as a sum with different weights, with autograd's: rows
given to the wrong samples or missing shares become a `CheckError`. With check=False nothing stands between the caller
and a wrong result. What no check can see: nothing that changes a gradient by more than rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from persample.backends import register
from persample.backends.module_rules import place
from persample.backends.shared import ADVICE, buffers_kept, check_rows
from persample.blocks.types import Block, Dense
from persample.capture.sum_check import check_graph, check_losses
from persample.capture.types import Capture, Captured, Problem
from persample.errors import UnsupportedError
from persample.graph.provenance import tensors_of


@register("opacus", covers="what Opacus covers, in training mode, with the batch first", requires="opacus")
def capture(problem: Problem) -> Capture:
    """Runs the model with Opacus' hooks on it, forward and backward."""
    wrapper = _grad_sample_module()
    _refuse_eval_mode(problem)
    with torch.inference_mode(False), torch.enable_grad(), attributes_kept(problem.model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        hooks = _attach(wrapper, problem.model)
        try:
            losses = _forward(problem, hooks)
            uses = _backward(losses, problem)
            hooks.disable_hooks()
            if problem.check:
                blocks: dict[str, list[Block]] = {name: [use.block for use in found] for name, found in uses.items()}
                check_rows(blocks, losses, problem.parameters, "opacus")
        finally:
            hooks.remove_hooks()
    return Capture(losses.detach(), uses)


def _grad_sample_module() -> Any:
    try:
        from opacus.grad_sample import GradSampleModule
    except ImportError as error:
        raise UnsupportedError(
            "backend 'opacus' needs the Opacus library: pip install 'opacus>=1.5'. Every other backend does without."
        ) from error
    return GradSampleModule


def _refuse_eval_mode(problem: Problem) -> None:
    trained = {id(p) for p in problem.parameters.values()}
    for path, module in problem.model.named_modules():
        if not module.training and any(id(p) in trained for p in module._parameters.values()):
            raise UnsupportedError(
                f"Opacus records in training mode alone, and {place(path)} ({type(module).__name__}) is in eval mode: "
                f"call model.train() where that computes the same. {ADVICE}"
            )


def _attach(wrapper: Any, model: nn.Module) -> Any:
    try:
        return wrapper(model, loss_reduction="sum", strict=True)
    except Exception as error:
        raise UnsupportedError(f"Opacus refuses this model: {_text(error)}. {ADVICE}") from error


def _forward(problem: Problem, hooks: Any) -> Tensor:
    """The losses. An error is Opacus' own if the model runs without its hooks, and the caller's otherwise."""
    try:
        losses = problem.losses()
    except Exception as error:
        hooks.remove_hooks()
        with torch.no_grad(), buffers_kept(problem.model), torch.random.fork_rng(devices=[]):
            problem.losses()
        raise UnsupportedError(f"Opacus' hooks fail in the forward pass: {_text(error)}. {ADVICE}") from error
    return check_losses(losses)


def _backward(losses: Tensor, problem: Problem) -> dict[str, tuple[Captured, ...]]:
    """The rows that Opacus' hooks leave on the parameters."""
    names = list(problem.parameters)
    check_graph(losses, problem.parameters)
    if not names:
        return {}
    # a module's hook fires when the gradients of its inputs are complete, so they have to be asked for too
    inputs = [t for t in tensors_of(problem.inputs) if t.requires_grad]
    wanted = [*problem.parameters.values(), *inputs]
    try:
        summed = torch.autograd.grad(losses, wanted, torch.ones_like(losses), retain_graph=True, allow_unused=True)[
            : len(names)
        ]
    except Exception as error:
        raise UnsupportedError(f"Opacus fails in the backward pass: {_text(error)}. {ADVICE}") from error
    uses: dict[str, tuple[Captured, ...]] = {}
    gradients: Any = summed  # None where a parameter is not used, which the annotation leaves out
    for name, gradient in zip(names, gradients, strict=True):
        rows: Any = getattr(problem.parameters[name], "grad_sample", None)
        if rows is None and gradient is None:
            uses[name] = ()
            continue
        expected = (losses.shape[0], *problem.parameters[name].shape)
        if not isinstance(rows, Tensor) or tuple(rows.shape) != expected:
            got = f"rows of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else "no rows"
            raise UnsupportedError(
                f"Opacus gave {got} for {name!r} where {expected} was expected: the parameter is used outside of its "
                f"module, or the batch is not dimension 0 of the module's input. {ADVICE}"
            )
        uses[name] = (Captured(Dense(rows.detach()), "opacus", "opacus"),)
    return uses


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Takes away what was added to modules and parameters: attributes, and hooks that an error left behind."""
    holders = [*model.modules(), *model.parameters()]
    before = [(holder, dict(vars(holder))) for holder in holders]
    tables = [getattr(module, name) for module in model.modules() for name in _HOOK_TABLES]
    hooks = [set(table) for table in tables]
    try:
        yield
    finally:
        for table, known_hooks in zip(tables, hooks, strict=True):
            for key in set(table) - known_hooks:
                del table[key]
        for holder, known in before:
            for name in vars(holder).keys() - known.keys():
                delattr(holder, name)
            for name in known.keys() & {"grad_sample", "_forward_counter"}:
                setattr(holder, name, known[name])


_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(". ") or type(error).__name__
