"""Gradients into `.grad`, as a backward pass accumulates them, and averaged over processes as replicas do."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor

COPY = (
    "these per-sample gradients were copied, loaded or unpickled, and know no parameters to accumulate into. Put what "
    "weighted_sum(c) returns into .grad of yours"
)


@torch.no_grad()
def accumulate(
    parameters: Mapping[str, Tensor], sums: Mapping[str, Tensor], unused: Collection[str], process_group: Any | None
) -> None:
    """Adds sums to `.grad` of the parameters that still require a gradient, and runs their hooks.

    Not by autograd's own nodes: hooks of replicas (DistributedDataParallel) sit there, and wait for a pass of theirs.

    Args:
        parameters: by name.
        sums: name -> [*shape].
        unused: parameters that no loss depends on; theirs stay as they are, None if they have none.
        process_group: over whose processes `.grad` is averaged; None for no exchange.
    """
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    used = {name: parameter for name, parameter in trained.items() if name not in unused}
    for name, parameter in used.items():
        _add(parameter, sums[name].to(parameter))
    if process_group is not None:
        used = _averaged(trained, used, process_group)
    for parameter in used.values():
        for hook in list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()):
            hook(parameter)


def _add(parameter: Tensor, gradient: Tensor) -> None:
    for hook in list((parameter._backward_hooks or {}).values()):
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    before = parameter.grad
    if before is None:
        parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
    elif before.layout == torch.strided:
        before.add_(gradient)
    else:
        parameter.grad = gradient + before  # a sparse gradient becomes a dense one


def _averaged(parameters: Mapping[str, Tensor], used: Mapping[str, Tensor], process_group: Any) -> dict[str, Tensor]:
    """Averages `.grad` over the processes; returns the parameters that the losses of any of them depend on.

    Zeros count for processes in which no loss does. All that was accumulated is averaged; what was so before stays the
    same.
    """
    if not parameters:
        return {}
    device = next(iter(parameters.values())).device
    anywhere = torch.tensor([name in used for name in parameters], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX, process_group)
    size = torch.distributed.get_world_size(process_group)
    found = {name: parameters[name] for name, uses in zip(parameters, anywhere.tolist(), strict=True) if uses}
    for parameter in found.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif parameter.grad.layout != torch.strided:
            parameter.grad = parameter.grad.to_dense()
        gradient = parameter.grad.div_(size)
        torch.distributed.all_reduce(
            torch.view_as_real(gradient) if gradient.is_complex() else gradient, group=process_group
        )
    return found
