"""Reweighting inside the backward pass: `loss.backward()` accumulates Σ_b c_b g_b instead of Σ_b g_b.

With g_b sample b's share of a layer's gradient and c what a policy returns. Symbols: `layer_grads`; how it is done:
`autograd`, under torch.compile `compile.operators`, for functions `functions.interception`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from persample.reweighting.batch_axis.folded import Folded
from persample.reweighting.functions.interception import watchable
from persample.reweighting.handle import Hook, Reweighting, layers_of
from persample.reweighting.layer import Layer
from persample.reweighting.policy import Follow, Known, Policy, PolicyCaller

BatchAxis = int | Folded | Mapping[str, int | Folded]
"""Where the samples are: see `reweight`."""

__all__ = ["BatchAxis", "Known", "Policy", "Reweighting", "reweight"]


def reweight(
    model: nn.Module,
    policy: Policy,
    *,
    known: Known | None = None,
    batch_axis: BatchAxis | None = None,
    joint: bool = False,
    outputs: bool = False,
    functions: bool = False,
    follow: Follow | None = None,
) -> Reweighting:
    """Returns a handle; until its `remove()`, backward passes accumulate Σ_b c_b g_b in the layers of
    `model`.

    For every `nn.Linear`, `nn.Conv1d`–`3d` and `nn.ConvTranspose1d`–`3d` that runs, weight and bias together,

        grad = Σ_b c_b g_b,    c = policy(layer path, grads),

    with g_b sample b's share of the gradient of the loss on which `backward()` is called (the form of
    equation 9 of the FNGD paper). All other parameters get the plain gradient Σ_b g_b. With given c it
    costs one elementwise product per layer beyond an ordinary backward pass.

    Arguments:
        policy: called once for each layer in each backward pass, with the layer's path and its `LayerGrads`.
            Returns None (the plain gradient), c of shape [B] (all ones is the plain gradient too), or the
            gradients of (weight, bias) themselves, where it has formed them anyway.
        known: asked before the policy, with the layer's path, the number of samples and their device: returns c where
            that does not depend on the gradients (stored factors), or None, whereupon the policy is asked. It saves
            what asking costs, which counts beside small layers. Not with joint=True.
        batch_axis: which axis of a layer's output counts samples; an int for all linear layers, or a dict by
            layer path; `persample.Folded` in place of an int says that every sample has several rows of it. By
            default it is found in the first backward pass: the axis that is as long as axis 0 of the first tensor
            given to the model (one of a single row that later ones share, as positions or a mask, is passed over),
            or a multiple of that (windows, frames or views folded into the batch; see below). Models that take time
            first, [T, B, …], are recognised where they mix steps and no samples (recurrence, attention); of others the
            losses of the first backward pass may tell that axis 1 counts samples, [B] before their mean, and a
            UserWarning says what they tell.
            In a convolution it is axis 0; giving {path: 0} makes each row a sample, whatever their number.
        joint: ask the policy once for all layers, when the backward pass has met the last of them: it gets a
            dict of `LayerGrads` by path and returns a dict of answers (a path left out: the plain gradient).
            Until then x and z of every layer are kept: the backward pass frees no activations on the way.
        outputs: keep the gradient at the model's output for the policy, as `output_grad` of the handle. The
            output is what the model's own forward returns, or its first tensor with an axis.
        functions: reweight the projections of `nn.MultiheadAttention` and parameters in products with data, too:
            `F.linear`, `x @ w` ([in, out] as well), `torch.addmm`, `bmm`, `einsum`, `tensordot` and `F.conv1d`–`3d`,
            as they are or parts of them by rows or columns; `persample.reweighting.functions.linear_calls` lists all.
            The policy is asked about them by the parameter's name ("attn.in_proj_weight", a part of it with its rows,
            "attn.in_proj_weight[0:8]"; "attn.out_proj"); `parameters(path)` of the handle returns their tensors.

        follow: called after each forward pass with gradients, with its number of samples (None where that is unknown);
            returns a function that is called, without arguments, when a backward pass reaches the model's output, from
            within it and before any layer is asked about. `upcoming()` of the handle then tells which will be.

    Raises:
        ValueError: the model is reweighted already or a TorchScript program, `batch_axis` names no layer or an
            impossible axis, or `known` is given with joint=True.
            In the backward pass: the batch axis of a layer that the policy wants to know of is uncertain, or the policy
            returned neither None nor [B].

    In the first forward pass, and for each new shape, the autograd graph between the model's output and its layers is
    read: where samples are apart in every operation, it proves where they lie in each call of a layer. So layers are
    read that are called on parts of the batch (chunks, crops, sample by sample); samples count as in the model's output
    then. Where sizes leave more than one reading of the output, or of layers of which nothing is proven, as they always
    do where rows are folded, or where rows were selected, the model is tried out after its forward pass, with some
    samples replaced by others, without gradients and with the same random numbers: 1 + 2 log₂ B runs, as many again in
    evaluation mode where that does not tell, and three as a rule for each new shape. Only a reading that every row
    agrees with is taken. `explain()` says which; giving it spares the trials. Rows that a mask or a packed sequence
    places may lie otherwise in the next batch of the same shape: where there are several of each sample they are
    refused unless you say how they lie in every batch. Lengths by which Python cuts and joins rows cannot be noticed.

    Layers that work on what all samples share (positions, learnt queries) are recognised in the first forward pass,
    and keep the plain gradient; under torch.compile only where the model is of a class of your own or joint=True, not
    where it is of one of torch's (`nn.Sequential`). Rows count as they lie in each layer: where a model reorders its
    samples, c is in that layer's order.

    Where modules couple samples (BatchNorm in training mode), g_b is what flows through sample b's rows, as
    in the paper; these still add up to the batch gradient. Layers with a frozen or parametrised weight,
    subclasses with their own forward, and weights used without calling their layer keep the plain
    gradient: see `explain()`. Of a weight whose layer is called and that the model's forward uses besides (tied
    autoencoders, embeddings), the calls alone are reweighted; the first batch tells, in `explain()` and, but for
    embeddings, by a UserWarning, though not of uses in a compiled graph, in a reentrant checkpoint or outside of
    the model. Second derivatives (create_graph=True) are refused by autograd.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> clip = lambda layer, grads: 1 / grads.norms().clamp(min=1)  # each sample, layer by layer
    >>> with reweight(model, clip):
    ...     model(torch.randn(5, 3)).sum().backward()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module; got {type(model).__name__}. Give the model itself, not its parameters"
        )
    if not callable(policy):
        raise TypeError(f"policy must be a function (layer, grads) -> c, [B], or None; got {type(policy).__name__}")
    _refuse_scripts(model)
    if joint and known is not None:
        raise ValueError("known= is asked layer by layer, but joint=True asks for all layers at once; give one of them")
    for path, module in model.named_modules():
        hooks = itertools.chain(module._forward_pre_hooks.values(), module._forward_hooks.values())
        if any(isinstance(hook, Hook) for hook in hooks):
            where = f"its module '{path}'" if path else "it"
            raise ValueError(
                f"this model is reweighted already ({where} carries hooks of persample.reweight). Call "
                "remove() on the earlier handle, or on the optimiser that made it, first. Two optimisers of one model: "
                "construct each with a part of the model."
            )
    modules = dict(layers_of(model))
    weights = watchable(model) if functions else {}
    names = {*modules, *weights.values()}
    axis_of = _axes(modules, names, batch_axis)
    tied = _tied(modules)
    layers = {
        path: Layer(path=path, module=module, where=axis_of(path))
        for path, module in modules.items()
        if path not in tied
    }
    policy_caller = PolicyCaller(policy, known, joint, follow)
    return Reweighting(model, policy_caller, layers, tied, axis_of, weights, outputs=outputs)


def _refuse_scripts(model: nn.Module) -> None:
    """Raises ValueError where a part of the model is a program of TorchScript, whose layers cannot be seen."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{f'the module {path!r}' if path else 'the model'} is a {type(module).__name__}, made by "
                "torch.jit.script or torch.jit.trace: its layers are not called one by one, so that their gradients "
                "cannot be reweighted. Give the eager model it was made from, and script it after training."
            )


def _tied(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Path of a linear layer → path of an earlier one with the same weight and bias: together they are one layer."""
    first: dict[tuple[int, int], str] = {}
    tied = {}
    for path, module in modules.items():
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if isinstance(module, nn.Linear) and weight is not None:
            earlier = first.setdefault((id(weight), id(bias)), path)
            if earlier != path:
                tied[path] = earlier
    return tied


def _axes(
    modules: Mapping[str, nn.Module], names: Collection[str], batch_axis: BatchAxis | None
) -> Callable[[str], int | Folded | None]:
    """Returns the function path → given axis."""
    if batch_axis is None:
        return lambda path: None
    if not isinstance(batch_axis, Mapping):
        everywhere, front = batch_axis, batch_axis.axis if isinstance(batch_axis, Folded) else batch_axis
        if not isinstance(front, int) or front < 0:
            raise ValueError(
                f"batch_axis={batch_axis!r}: count axes from the front, 0, 1, …; or give a persample.Folded, or a dict "
                "by layer"
            )
        return lambda path: everywhere if isinstance(modules.get(path), nn.Linear | None) or not front else None
    unknown = sorted(path for path in batch_axis if path not in names and path.split("[")[0] not in names)
    if unknown:
        raise ValueError(f"batch_axis names {unknown}, but the layers that can be named are {sorted(names)}.")
    for path, where in batch_axis.items():
        axis = where.axis if isinstance(where, Folded) else where
        if axis < 0 or (axis and not isinstance(modules.get(path), nn.Linear | None)):
            raise ValueError(
                f"batch_axis={{'{path}': {where}}}: axes count from the front, and a convolution has its "
                "samples on axis 0."
            )
    return dict(batch_axis).get
