"""The entry points: `per_sample`, `from_losses`, `grad` and `backends`."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from persample.backends import BACKENDS
from persample.backends.losses import capture_losses
from persample.backends.outputs import HeldGraph, capture_or_hold, hold_graph
from persample.capture.eagerly import eagerly
from persample.capture.sharded import refuse_sharded
from persample.capture.types import Capture, Problem
from persample.errors import CheckError, CoupledSamplesError, PerSampleError, UnsupportedError
from persample.graph.nodes import trace
from persample.graph.saved import saved_by
from persample.result.arguments import check_size
from persample.result.holding.chunked import ChunkedPerSampleGrads, batch_of
from persample.result.holding.graph_held import GraphPerSampleGrads
from persample.result.holding.unchanged import addresses
from persample.result.holding.whole import whole
from persample.result.per_sample_grads import PerSampleGrads


@torch.compiler.disable
def per_sample(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Float[Tensor, " batch"]],
    inputs: Any,
    targets: Any = None,
    *,
    backend: str = "outputs",
    coupled: str = "error",
    check: bool = True,
    chunk_size: int | None = None,
    randomness: str = "error",
    hold: str = "auto",
) -> PerSampleGrads | ChunkedPerSampleGrads:
    """Returns the per-sample gradients g_b = ∂ℓ_b/∂θ of every trainable parameter, as factors.

    Args:
        model: any eager PyTorch module. Parameters that do not require a gradient are left out.
        loss_fn: `loss_fn(outputs, targets)`, one loss for each sample, [B].
        inputs: a tensor, a tuple of positional or a dict of keyword arguments for the model; the batches of tokenizers
            (`collections.UserDict`) are such dicts.
        targets: whatever the loss function takes.
        backend: one of `backends()`; or "auto", the first of them that covers the model, `notes` of the result
            saying why others did not.
        coupled: "error" refuses models whose samples influence each other; "rows" reads the rows of each
            layer's gradient instead, sample b being row b of dimension 0, as the FNGD paper does with batch
            normalisation in training mode.
        check: verify that the rows add up to the batch gradient, and that the losses of chunks are those of the batch.
        chunk_size: samples held at once. Larger batches are cut along dimension 0 of every tensor in inputs and
            targets that has B entries there, as are lists of B dicts or strings, and captured anew for each reduction
            (`persample.result.holding.chunked`). A model that draws random numbers draws others for chunks than it does
            for the whole batch: other dropout masks, the same ones in every reduction.
        randomness: backend "vmap" alone: "error", "same" or "different", as in `torch.func.vmap`.
        hold: "factors" runs the backward pass at once and keeps the input and output gradient of every operation with
            parameters, from which any number of reductions is formed. "graph" keeps the autograd graph instead, and
            every reduction is one more backward pass that frees each layer's factors when they are used: the least
            memory, that of the plain step. Backend "outputs" alone. "auto" is "factors", but for models that
            checkpoint (`torch.utils.checkpoint`), of which factors would hold what they do not: "graph", in which every
            reduction computes a segment again when it comes to it.

    Raises:
        CoupledSamplesError: samples influence each other; the message names the operation.
        UnsupportedError: the backend does not cover the model; the message names the layer.
        CheckError: the rows do not add up to the batch gradient.
        PerSampleError: no parameter requires a gradient, or the losses do not, as in `losses.sum().backward()`, or
            they depend on none of the parameters.
        ValueError, TypeError: losses of another shape, unknown options.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> loss = lambda outputs, targets: torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
        >>> psg = per_sample(model, loss, torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
        >>> psg.grads()["weight"].shape, psg.norms().shape
        (torch.Size([5, 2, 3]), torch.Size([5]))
    """
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
    check_size(chunk_size)
    if coupled not in ("error", "rows"):
        raise ValueError(f"coupled must be 'error' or 'rows'; got {coupled!r}")
    if chunk_size is not None and coupled == "rows":
        raise ValueError(
            "chunk_size and coupled='rows' exclude each other: where samples influence each other, the rows of a chunk "
            "are not those of the whole batch. Leave one of them out; hold='graph' saves memory with coupled='rows' too"
        )
    if hold not in ("auto", "factors", "graph"):
        raise ValueError(f"hold must be 'auto', 'factors' or 'graph'; got {hold!r}")
    if hold == "graph" and backend != "outputs":
        raise ValueError(f"hold='graph' needs backend='outputs'; got backend={backend!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module; got {type(model).__name__}. "
            "For losses computed without a module use persample.from_losses(losses, params)"
        )
    if not callable(loss_fn) or isinstance(loss_fn, type):
        raise TypeError(
            f"loss_fn must be a function (outputs, targets) -> losses, one for each sample, [B]; got {loss_fn!r}. "
            "A criterion of torch will do, with reduction='none'"
        )
    inputs = arguments_of(inputs)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    refuse_sharded(model, parameters)
    refuse_nothing(model, parameters)
    refuse_gradient_hooks(parameters)
    refuse_meta(parameters)

    @eagerly
    def capture(some_inputs: Any, some_targets: Any) -> PerSampleGrads:
        problem = Problem(
            model, loss_fn, some_inputs, some_targets, parameters, coupled=coupled, check=check, randomness=randomness
        )
        name: str = backend
        found: Capture | HeldGraph
        if backend == "auto":
            name, found = capture_first(problem)
        elif backend == "outputs" and hold != "factors":
            found = hold_graph(problem) if hold == "graph" else capture_or_hold(problem)
        else:
            found = BACKENDS[backend].capture(problem)
        caller = addresses(problem.within_reach)
        if isinstance(found, HeldGraph):
            return GraphPerSampleGrads(found, parameters, name, caller)
        return PerSampleGrads(found, parameters, name, caller)

    if chunk_size is not None:
        refuse_counts(model)
    batch = batch_of(inputs)
    if chunk_size is None or batch is None or batch <= chunk_size:
        return capture(inputs, targets)
    together = whole(Problem(model, loss_fn, inputs, targets, parameters)) if check else None
    return ChunkedPerSampleGrads(capture, inputs, targets, chunk_size, batch, state_of(model), together)


def arguments_of(inputs: Any) -> Any:
    """The inputs as a model takes them: one that is a tuple or a mapping by its type is none of several arguments."""
    if isinstance(inputs, PackedSequence):
        return (inputs,)
    return dict(inputs) if isinstance(inputs, (dict, UserDict)) else inputs  # torch's trees look into no subclasses


def refuse_nothing(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Raises `PerSampleError` for a model without a parameter that can be trained: norms would be zeros."""
    if not parameters:
        there = sum(1 for _ in model.parameters())
        raise PerSampleError(
            f"no parameter of the model ({type(model).__name__}) requires a gradient"
            + (f": all {there} are frozen. Call requires_grad_() on those to differentiate for" if there else "")
            + ("" if there else ": it has none. For other tensors there is persample.from_losses(losses, params)")
        )


def refuse_gradient_hooks(parameters: Mapping[str, Tensor]) -> None:
    """Raises `UnsupportedError` for parameters with hooks that change their gradient: rows would not pass them."""
    for name, parameter in parameters.items():
        if parameter._backward_hooks:
            raise UnsupportedError(
                f"parameter {name!r} has gradient hooks (Tensor.register_hook), which act on the gradient of the whole "
                "batch. Remove them, and apply to the rows what they do; post-accumulate hooks may stay"
            )


def refuse_meta(parameters: Mapping[str, Tensor]) -> None:
    """Raises `ValueError` for parameters that hold no numbers."""
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the device 'meta' and holds no numbers. Give the model memory with "
                "model.to_empty(device=...), then load or initialise its weights"
            )


def state_of(model: nn.Module) -> list[Tensor]:
    """What the model computes with beside its inputs: parameters and buffers; not its counters."""
    return [*model.parameters(), *(each for each in model.buffers() if each.is_floating_point() or each.is_complex())]


def refuse_counts(model: nn.Module) -> None:
    """Raises `UnsupportedError` for tables whose gradients are divided by counts over the batch: chunks have others."""
    for path, module in model.named_modules():
        if getattr(module, "scale_grad_by_freq", False):
            raise UnsupportedError(
                f"layer {path!r} has scale_grad_by_freq=True: its gradients are divided by how often an index is in "
                "the batch, which a chunk does not know. Leave chunk_size out (hold='graph' saves "
                "memory too), or switch scale_grad_by_freq off"
            )


def capture_first(problem: Problem) -> tuple[str, Capture]:
    """The first backend that covers the problem, and its capture, with what the others said among the notes.

    Raises:
        UnsupportedError: none does; the message holds what each said.
    """
    refusals = []
    for name, backend in BACKENDS.items():
        try:
            captured = backend.capture(problem)
        except CoupledSamplesError:
            raise  # a property of the model, not of the backend
        except (UnsupportedError, CheckError, NotImplementedError) as error:
            refusals.append(f"{name}: {error}")
            continue
        return name, replace(captured, notes=(*refusals, *captured.notes))
    raise UnsupportedError("no backend covers this model. " + " ".join(refusals))


@torch.compiler.disable
def from_losses(
    losses: Float[Tensor, " batch"],
    params: Tensor | Iterable[Tensor] | Mapping[str, Tensor],
    *,
    check: bool = True,
) -> PerSampleGrads:
    """Returns the per-sample gradients g_b = ∂ℓ_b/∂θ of losses that are already there, as factors: what `per_sample`
    returns, without a module.

    Losses alone do not tell data from parameters, so samples that influence each other cannot be refused: row b is
    ∂ℓ_b/∂θ whatever else ℓ_b depends on, the row of the Jacobian. The first call with a graph of its kind is probed,
    and checked in full; later ones follow its plan where the graph proves it, as those of `per_sample` do.

    Several losses may share what the model has computed. Let there be N of them, of B rows each: all C outputs of a
    sample (N = B·C), the T tokens of a sequence (N = B·T). The graph shows it, and one backward pass for each loss of a
    row, C or T, is made, all at once in small models; what no loss changes is held once for a row. Where every loss
    depends on all rows (contrastive losses, batch normalisation) there are N passes, as in a loop, at once in small
    models. Losses that were selected of these (`losses[mask]`) count as the latter: give all of them, and select rows.

    Args:
        losses: [B], the losses of a batch, their graph still there; it is kept.
        params: leaf tensors that require a gradient; or a dict name -> tensor, as `dict(model.named_parameters())`.
            Without names they are "0", "1" and so on, all of the layer "".
        check: as in `per_sample`.

    Raises:
        PerSampleError: the losses do not require a gradient, so that there is no graph, or depend on no parameter.
        TypeError, ValueError: params that are no leaf tensors, or do not require a gradient.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> psg = from_losses((torch.tensor([[3.0, 4.0], [0.0, 1.0]]) * w).sum(1), {"w": w})
        >>> psg.norms(), psg.weighted_sum(torch.tensor([1.0, 2.0]))
        (tensor([5., 1.]), {'w': tensor([3., 6.])})
    """
    names = named(params)
    capture = capture_losses(losses, names, check=check)
    saved = saved_by(trace(losses).order)
    # what no operation of the graph has computed came from outside: the batch, which its owner may write to
    outside = [each for each in saved if each.grad_fn is None]
    return PerSampleGrads(capture, names, "outputs", addresses([*outside, *names.values()]))


@torch.compiler.disable
def grad(
    losses: Float[Tensor, " *batch"],
    params: Tensor | Iterable[Tensor],
    *,
    check: bool = True,
) -> tuple[Inexact[Tensor, " *batch_shape"], ...]:
    """Returns the gradient of each loss for each parameter: like `torch.autograd.grad`, one row per loss.

    The rows of `from_losses`, which has norms, Gram matrices and sums without forming them, and says what it costs
    where losses share what the model has computed: all outputs of a sample, one loss a token, pairs.

    Args:
        losses: [B], the losses of a batch, or of several axes, as [B, C] or [B, T]; their graph is kept.
        params: leaf tensors that require a gradient.
        check: as in `per_sample`.

    Returns:
        One tensor [*losses.shape, *shape] for each parameter; zeros where no loss depends on it, but on others.

    Raises:
        PerSampleError: the losses do not require a gradient, so that there is no graph, or depend on no parameter.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> grad((torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * w).sum(1), w)
        (tensor([[1., 2.],
                [3., 4.]]),)
        >>> model = torch.nn.Linear(3, 2)
        >>> [rows.shape for rows in grad(model(torch.randn(5, 3)), model.parameters())]
        [torch.Size([5, 2, 2, 3]), torch.Size([5, 2, 2])]
    """
    names = named(params)
    several = isinstance(losses, Tensor) and losses.ndim > 1
    with torch.enable_grad():
        capture = capture_losses(losses.flatten() if several else losses, names, check=check)
    rows = PerSampleGrads(capture, names, "outputs").grads().values()
    return tuple(each.view(*losses.shape, *each.shape[1:]) if several else each for each in rows)


def named(params: Tensor | Iterable[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, by position where they have none; what rows cannot be formed of is refused."""
    if not isinstance(params, (Tensor, Iterable)):
        raise TypeError(f"params must be tensors, such as model.parameters(); got {type(params).__name__}")
    if isinstance(params, Mapping):
        names = dict(params)
    else:
        wanted = [params] if isinstance(params, Tensor) else list(params)
        names = {str(position): parameter for position, parameter in enumerate(wanted)}
    told = {name: f"params[{name!r}]" if isinstance(params, Mapping) else f"params[{name}]" for name in names}
    for name, parameter in names.items():
        if not (isinstance(parameter, Tensor) and parameter.is_leaf and parameter.requires_grad):
            got = type(parameter).__name__ if not isinstance(parameter, Tensor) else "one that is not"
            raise ValueError(
                f"{told[name]} must be a leaf tensor that requires a gradient; got {got}: give "
                "model.parameters(), or tensors with requires_grad=True that no operation has computed"
            )
    if not names:
        raise ValueError(
            "params holds no tensor: give model.parameters(), or tensors that require a gradient. A generator that was "
            "used before is empty"
        )
    refuse_sharded(None, {told[name]: parameter for name, parameter in names.items()})
    refuse_gradient_hooks(names)
    refuse_meta(names)
    return names


def backends() -> tuple[str, ...]:
    """Returns the names of the backends, in order of preference.

    >>> backends()
    ('outputs', 'hooks', 'vmap', 'opacus')
    """
    return tuple(BACKENDS)
