"""Backend `vmap`: `torch.func` differentiates each sample by itself, vectorised over the batch.

    g_b = ∂/∂θ ℓ(model(x_b), y_b), with x_b one sample in a batch of one

The model must be a function that functorch can trace: no data-dependent control flow, no in-place change of
buffers. Tensors whose dimension 0 has B entries are taken to hold the samples, all others to be shared; losses
computed alone must equal those of the whole batch, which finds wrong guesses and samples that influence each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from persample.attribution.coupling import several_losses
from persample.backends import register
from persample.backends.shared import ADVICE, buffers_kept, check_rows
from persample.blocks.types import Dense
from persample.capture.sum_check import check_graph, check_losses
from persample.capture.types import Capture, Captured, Problem, alone
from persample.errors import PerSampleError, UnsupportedError
from persample.graph.batch_size import batch_size
from persample.graph.containers import mapped
from persample.graph.nodes import precision_within, trace

RANDOMNESS = ("error", "same", "different")
LOSS_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative deviation of a loss computed alone from the loss in the batch; half precision: `HALF_TOLERANCE`."""
HALF_TOLERANCE = 5e-2


@register("vmap", covers="models that functorch can batch: no recurrent layers, no changes of buffers")
def capture(problem: Problem) -> Capture:
    """Runs the model once on the whole batch, and once under `vmap`."""
    if problem.randomness not in RANDOMNESS:
        raise ValueError(f"randomness must be one of {', '.join(map(repr, RANDOMNESS))}; got {problem.randomness!r}")
    with torch.inference_mode(False):
        return _capture(problem)


def _capture(problem: Problem) -> Capture:
    drawn = _random_state()
    with buffers_kept(problem.model) as changed_buffers:
        with torch.set_grad_enabled(problem.check):
            losses = check_losses(problem.losses())
        if problem.check:
            check_graph(losses, problem.parameters)
        random = not all(map(torch.equal, drawn, _random_state()))
        changed = changed_buffers()
        if changed:
            raise UnsupportedError(
                f"the forward pass changes buffers ({', '.join(map(repr, changed[:3]))}), as batch normalisation does "
                f"in training mode, and a model under vmap must not. Call model.eval(), or the layer's. {ADVICE}"
            )
        gradients, each = differentiate(problem, losses.shape[0])
        if not problem.check and not any(bool(rows.any()) for rows in gradients.values()):
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):  # functorch gives zeros without a graph, too
                check_graph(problem.losses(), problem.parameters)
    notes = []
    if not random:
        refuse_other_losses(each, losses.detach(), precision_within(losses))
        each = losses.detach()
    elif problem.check:
        notes.append(
            f"check skipped: the model draws random numbers, and with randomness={problem.randomness!r} "
            "the samples alone draw others than the batch"
        )
    uses: dict[str, tuple[Captured, ...]] = {
        name: (Captured(Dense(values), "vmap", "vmap"),) for name, values in gradients.items()
    }
    if problem.check:
        connected = _connected(losses, problem.parameters)
        # functorch gives zeros for what is not used
        uses = {name: found if name in connected else () for name, found in uses.items()}
        if not random:
            blocks = {name: [use.block for use in found] for name, found in uses.items()}
            check_rows(blocks, losses, problem.parameters, "vmap")
    return Capture(each, uses, tuple(notes))


def differentiate(problem: Problem, batch: int) -> tuple[dict[str, Tensor], Tensor]:
    """Returns per-sample gradients by parameter, and the losses [B] of the samples alone."""
    parameters = {name: p.detach() for name, p in problem.parameters.items()}
    leaves: list = []

    def note(leaf: Any) -> Any:
        leaves.append(leaf)
        return leaf

    mapped(note, (problem.inputs, problem.targets))
    samples = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim and leaf.size(0) == batch]
    if any(isinstance(leaf, Tensor) and leaf.is_nested for leaf in leaves):
        raise UnsupportedError(f"functorch cannot batch nested tensors among the inputs or targets. {ADVICE}")
    if batch == 0 or not parameters:
        empty = {name: p.new_zeros(batch, *p.shape) for name, p in parameters.items()}
        with torch.no_grad():
            return empty, check_losses(problem.losses())
    if not samples:
        raise UnsupportedError(
            f"backend 'vmap' found no tensor with {batch} samples along dimension 0 in the inputs or the targets, "
            f"though there are {batch} losses. {several_losses(batch_size((problem.inputs,), {}), batch) or ADVICE}"
        )
    one = _single(problem, leaves, samples)
    run = torch.vmap(grad_and_value(one), in_dims=(None, *(0 for _ in samples)), randomness=problem.randomness)
    try:
        with warnings.catch_warnings():
            # operations without a batching rule run one sample after the other, which is slow but right
            warnings.filterwarnings("ignore", "There is a performance drop")
            gradients, losses = run(parameters, *(leaves[k].detach() for k in samples))
    except PerSampleError:
        raise
    except Exception as error:
        remedy = (
            "Pass randomness='different' for an independent draw for each sample, or 'same' for one draw for all"
            if "randomness" in str(error)
            else ADVICE
        )
        raise UnsupportedError(
            f"functorch cannot batch this model: {_first_line(error)}. {remedy.rstrip('.')}."
        ) from error
    return {name: values.detach() for name, values in gradients.items()}, losses.detach()


def _registered(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Every place where the model registers a parameter, each module once: path there -> the parameter's name.

    `functional_call` finds such places by itself, but of a module with two names twice, and then leaves what it has put
    there behind (torch 2.13).
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {
        f"{path}.{own}".lstrip("."): names[id(parameter)]
        for path, module in model.named_modules()
        for own, parameter in module._parameters.items()
        if id(parameter) in names
    }


def _single(problem: Problem, leaves: Sequence[Any], samples: Sequence[int]) -> Callable[..., Tensor]:
    """The loss of one sample as a function of parameters and the sample's tensors."""
    model, loss_fn = alone(problem.model, problem.inputs), problem.loss_fn
    registered = _registered(model, problem.parameters)

    def one(parameters: Mapping[str, Tensor], *sample: Tensor) -> Tensor:
        filled = list(leaves)
        for k, tensor in zip(samples, sample, strict=True):
            filled[k] = tensor.unsqueeze(0)
        supply = iter(filled)
        inputs, targets = mapped(lambda leaf: next(supply), (problem.inputs, problem.targets))
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else () if isinstance(inputs, dict) else (inputs,)
        kwargs = inputs if isinstance(inputs, dict) else {}
        values = {place: parameters[name] for place, name in registered.items()}
        loss = loss_fn(functional_call(model, values, args, kwargs, tie_weights=False), targets)
        if not isinstance(loss, Tensor) or tuple(loss.shape) != (1,):
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise UnsupportedError(
                f"a sample alone, as a batch of one along dimension 0 of each input, has losses {got} where (1,) "
                f"was expected: the inputs are not laid out with the batch first, or the model fixes its batch size. "
                f"{ADVICE}"
            )
        return loss[0]

    return one


def refuse_other_losses(alone: Tensor, together: Tensor, precision: torch.dtype) -> None:
    """Raises unless each sample's loss computed alone is its loss in the batch, as far as a precision tells."""
    tolerance = LOSS_TOLERANCE.get(precision, HALF_TOLERANCE)
    finite = together.isfinite() & alone.isfinite()
    scale = together[finite].abs().max() if bool(finite.any()) else together.new_zeros(())
    allowed = tolerance * together.abs() + 1e-3 * tolerance * scale
    wrong = finite & ((alone - together).abs() > allowed)
    if bool(wrong.any()):
        sample = int(wrong.nonzero()[0, 0])
        raise UnsupportedError(
            f"sample {sample} alone has the loss {float(alone[sample]):.6g}, in the batch "
            f"{float(together[sample]):.6g}: the samples influence each other "
            "(batch normalisation, a loss normalised over the batch), or an input "
            "that all of them share has as many entries along dimension 0 as there are samples. "
            "backend='outputs' says which, and where."
        )


def _connected(losses: Tensor, parameters: Mapping[str, Tensor]) -> set[str]:
    """Names of the parameters that the losses depend on."""
    if not losses.requires_grad:
        return set()
    leaves = trace(losses).leaves
    return {name for name, parameter in parameters.items() if id(parameter) in leaves}


def _random_state() -> list[Tensor]:
    """States of the generators that a model draws from."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.random.get_rng_state(), *devices]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
