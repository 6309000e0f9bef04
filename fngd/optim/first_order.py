"""The first-order rules that turn a direction into a step: SGD with momentum, and AdamW, as torch computes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

RULES = ("sgd", "adamw")
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
"""Options of AdamW where none are given; they are torch's."""


def sgd_update(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    decoupled_weight_decay: bool,
    foreach: bool | None = None,
) -> None:
    """Changes `params` and momentum `buffers` in place by one step of torch's SGD.

    θ ← θ − lr·m,  m ← momentum·m + grad (+ weight_decay·θ); decoupled: θ ← (1 − lr·weight_decay)·θ before
    that. `foreach`: torch's implementation with one kernel for many tensors; None lets torch choose.
    """
    if decoupled_weight_decay and weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        weight_decay = 0.0
    sgd(
        params,
        grads,
        buffers,
        has_sparse_grad=any(grad.is_sparse for grad in grads),
        weight_decay=weight_decay,
        foreach=foreach,
        momentum=momentum,
        lr=lr,  # type: ignore[arg-type]  # tensors are fine, says torch.optim.SGD
        dampening=0.0,
        nesterov=nesterov,
        maximize=False,
    )


def sgd_step(group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], state: Any) -> None:
    """Makes a step of SGD with a group's options; momentum is kept in state[param]["momentum_buffer"]."""
    buffers = [state[param].get("momentum_buffer") for param in params]
    options = ("lr", "momentum", "nesterov", "weight_decay", "decoupled_weight_decay")
    sgd_update(params, grads, buffers, **{name: group[name] for name in options}, foreach=group.get("foreach"))
    if group["momentum"]:
        for param, buffer in zip(params, buffers, strict=True):
            state[param]["momentum_buffer"] = buffer


def first_order_step(group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], state: Any) -> None:
    """Makes a step of the group's own rule, SGD where it names none."""
    rule = adamw_step if group.get("rule") == "adamw" else sgd_step
    rule(group, params, grads, state)


def adamw_step(group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], state: Any) -> None:
    """Makes a step of torch's AdamW with a group's options; its moments are kept in state[param].

    Raises ValueError for sparse gradients, of which AdamW keeps no moments.
    """
    sparse = [tuple(param.shape) for param, grad in zip(params, grads, strict=True) if grad.is_sparse]
    if sparse:
        raise ValueError(
            f"parameters of shape {sparse} have sparse gradients, as nn.Embedding(sparse=True) makes them, and AdamW "
            "takes dense ones alone. Construct the embedding with sparse=False, or give it a parameter group with "
            "rule='sgd'"
        )
    for param in params:
        if "step" not in state[param]:
            state[param]["step"] = torch.zeros(())  # on the CPU, where torch's own function wants it
            state[param]["exp_avg"] = torch.zeros_like(param)
            state[param]["exp_avg_sq"] = torch.zeros_like(param)
    adamw(
        params,
        grads,
        [state[param]["exp_avg"] for param in params],
        [state[param]["exp_avg_sq"] for param in params],
        [],
        [state[param]["step"] for param in params],
        foreach=group.get("foreach"),
        has_complex=any(param.is_complex() for param in params),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
