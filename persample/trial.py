"""Which axis of a layer's output counts samples, where sizes do not tell: tried out on the model itself.

Replace one sample of the model's input by another: in the output of every layer that is before any coupling of
samples, what changes is the slice of that sample and nothing else. Two samples are replaced, one at a time, so
that an axis must follow both. The trial runs once, without gradients; random numbers and buffers are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

Run = Callable[[tuple, dict], dict[Any, list[Tensor]]]
"""(args, kwargs) of the model → outputs by layer."""


@contextmanager
def rehearsal(model: nn.Module) -> Iterator[None]:
    """Within the context the model can be run as if it had not been: no graph, and its state is put back."""
    devices = sorted({each.device.index or 0 for each in model.parameters() if each.device.type == "cuda"})
    # Exchanged, not written back: the graph of the pass before may hold them, and tells when they are written to.
    places = [(module._buffers, name, own) for module in model.modules() for name, own in module._buffers.items()]
    copies = {id(own): own.clone() for _, _, own in places if own is not None}
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)  # it calls no module
        try:
            for buffers, name, own in places:
                buffers[name] = None if own is None else copies[id(own)]
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for buffers, name, own in places:
                buffers[name] = own


def batch_axes(
    model: nn.Module, run: Run, args: tuple, kwargs: dict, candidates: Mapping[Any, Sequence[int]], batch: int
) -> dict[Any, int]:
    """Returns for each layer that axis among its candidates that follows the samples; undecided ones are left out.

    Arguments:
        model: its modules are put into evaluation mode where the mode of training leaves layers undecided
            (batch normalisation couples samples), and back.
        run: runs the model once, within `rehearsal`.
        args, kwargs: what the model was called with. The first tensor with `batch` samples on axis 0 is changed;
            the next (it may be a mask, and its axis no batch) only for layers that do not depend on the first.
        candidates: axes by layer.
        batch: number of samples B.
    """
    if batch < 2:
        return {layer: axes[0] for layer, axes in candidates.items()}  # one sample: any axis of length one
    found: dict[Any, int] = {}
    modes = [(module, module.training) for module in model.modules()]
    try:
        for training in (True, False):
            left = {layer: axes for layer, axes in candidates.items() if layer not in found}
            if left and (training or any(was for _, was in modes)):
                for module, was in modes:
                    module.training = was and training
                found.update(_followed(model, run, args, kwargs, left, batch))
    finally:
        for module, was in modes:
            module.training = was
    return found


def _followed(
    model: nn.Module, run: Run, args: tuple, kwargs: dict, candidates: Mapping[Any, Sequence[int]], batch: int
) -> dict[Any, int]:
    leaves, tree = tree_flatten((args, kwargs))
    with rehearsal(model):
        before = run(args, kwargs)
    found: dict[Any, int] = {}
    left = {layer: axes for layer, axes in candidates.items() if layer in before}
    for number, leaf in enumerate(leaves):
        if not left or not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != batch:
            continue
        follows = {layer: set(axes) for layer, axes in left.items()}
        untouched = set(left)
        for sample, other in ((0, batch - 1), (batch - 1, 0)):
            changed = leaf.detach().clone()
            changed[sample] = changed[other]
            with rehearsal(model):
                after = run(*tree_unflatten([*leaves[:number], changed, *leaves[number + 1 :]], tree))
            for layer, axes in follows.items():
                differences = [_difference(a, b) for a, b in zip(before[layer], after.get(layer, ()), strict=False)]
                if any(each is None or each.any() for each in differences):
                    untouched.discard(layer)
                axes &= {axis for axis in axes if all(_confined(each, axis, sample) for each in differences)}
        found.update({layer: min(axes) for layer, axes in follows.items() if layer not in untouched and len(axes) == 1})
        left = {layer: axes for layer, axes in left.items() if layer in untouched}
    return found


def _difference(before: Tensor, after: Tensor) -> Tensor | None:
    """Where the two differ, None if they cannot be compared."""
    if before.shape != after.shape:
        return None
    return (before != after) & ~(before.isnan() & after.isnan())


def _confined(different: Tensor | None, axis: int, sample: int) -> bool:
    """Whether there are differences in that slice and nowhere else."""
    if different is None:
        return False
    changed = different.movedim(axis, 0).flatten(1).any(1)
    return bool(changed[sample]) and int(changed.sum()) == 1
