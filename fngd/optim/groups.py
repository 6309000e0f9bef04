"""Parameter groups of the preconditioned optimisers, and the checks of their options."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fngd.optim.checks import check_options
from fngd.optim.first_order import ADAMW, RULES

GROUPED = (
    "lr", "momentum", "nesterov", "weight_decay", "decoupled_weight_decay", "precondition", "damping", "betas", "eps",
)  # fmt: skip
"""Options that a parameter group may have of its own."""


def first_order_groups(
    params: Iterable[Any], chosen: set[Tensor], other: str, options: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Returns the parameter groups; with other="adamw" what is not `chosen` moves to groups of its own.

    So a scheduler sees both learning rates, and each group is stepped by one rule. Groups that name a rule keep it.

    Raises ValueError for an unknown rule or option, or where there are no parameters.
    """
    if other not in RULES:
        raise ValueError(f"other={other!r} is unknown; choose one of {list(RULES)}")
    given = dict(options or {})
    if given and other != "adamw":
        raise ValueError("other_options are those of AdamW; give other='adamw' or parameter groups of your own")
    unknown = sorted(set(given) - set(ADAMW))
    if unknown:
        raise ValueError(f"other_options has {unknown}; AdamW takes {list(ADAMW)}")
    check_options(given)
    listed = list(params)
    if not listed:
        raise ValueError("there are no parameters to optimise: the model has none, or params= is empty")
    groups = [dict(group) for group in listed] if listed and isinstance(listed[0], dict) else [{"params": listed}]
    if other == "sgd":
        return groups
    result = []
    for group in groups:
        if "rule" in group:
            result.append(group)
            continue
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        # (name, parameter) where model.named_parameters() was given
        there = [(param[1] if isinstance(param, tuple) else param) in chosen for param in members]
        if not group.get("precondition", True):
            there = [False] * len(members)
        inside = [param for param, here in zip(members, there, strict=True) if here]
        outside = [param for param, here in zip(members, there, strict=True) if not here]
        if inside:
            result.append({**group, "params": inside})
        if outside:
            result.append({**group, **ADAMW, **given, "params": outside, "rule": "adamw", "precondition": False})
    return result


def sgd_options(
    lr: Any, momentum: float, nesterov: bool, weight_decay: float, decoupled_weight_decay: bool, **others: Any
) -> dict[str, Any]:
    """Returns what every parameter group has: the options of SGD and whether to precondition, and `others`."""
    return {
        "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
        "decoupled_weight_decay": decoupled_weight_decay, "precondition": True, "rule": "sgd", **others,
    }  # fmt: skip


def completed_group(param_group: dict[str, Any]) -> dict[str, Any]:
    """Returns the group with AdamW's betas and eps, where that is its rule.

    Not among an optimiser's defaults: OneCycleLR and CyclicLR would take them to mean that there is no momentum.
    """
    if param_group.get("rule") != "adamw":
        return param_group
    return {"betas": ADAMW["betas"], "eps": ADAMW["eps"], **param_group}


def first_parameter(groups: Iterable[Mapping[str, Any]]) -> Tensor:
    """Returns the first parameter that there is: a group may be empty, but not all of them are."""
    return next(param for group in groups for param in group["params"])


def check_group(group: Mapping[str, Any]) -> None:
    """Raises ValueError for a parameter group with an option out of range."""
    check_options({name: group[name] for name in GROUPED if name in group})
    if group.get("foreach") is not None:
        check_options({"foreach": group["foreach"]})
    if group["nesterov"] and not group["momentum"]:
        raise ValueError("nesterov=True needs momentum > 0")
    if group["rule"] not in RULES:
        raise ValueError(f"rule={group['rule']!r} is unknown; choose one of {list(RULES)}")
    if group.get("damping") == math.inf:
        raise ValueError("damping=inf makes every step 0; for the plain gradient give precondition=False")


def check_scaler(scaler: Any) -> None:
    """Raises ValueError unless it is a GradScaler, or None."""
    if scaler is not None and not all(callable(getattr(scaler, name, None)) for name in ("scale", "is_enabled")):
        raise ValueError(f"scaler={type(scaler).__name__}; it must be the GradScaler that scales the loss, or None")
