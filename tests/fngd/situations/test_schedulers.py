"""Torch's schedulers find an ordinary optimiser: its groups, rates and momenta are theirs to change."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import build_model, data, deviation
from torch import nn
from torch.nn import functional as F

from fngd import KFAC, NGD, SKFAC, Eva, Shampoo

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2),
    "multistep": lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, [1, 3]),
    "one cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=8),  # momentum, too
    "cyclic": lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=2),
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "exponential": lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.7),
    "sequential": lambda opt: torch.optim.lr_scheduler.SequentialLR(
        opt,
        [torch.optim.lr_scheduler.LinearLR(opt, 0.1, 1.0, 2), torch.optim.lr_scheduler.ConstantLR(opt, 0.5)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # torch's own SequentialLR
def test_schedulers_see_an_ordinary_optimiser(name: str) -> None:
    """Groups with options of their own; infinite damping, so that torch.optim.SGD is the truth, step for step."""
    ours, (x, y) = build_model(), data()
    theirs = copy.deepcopy(ours)

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        return [
            {"params": [*net[0].parameters(), *net[1].parameters()], "weight_decay": 0.1},
            {"params": [*net[4].parameters(), *net[6].parameters()], "lr": 0.02, "momentum": 0.5},
        ]

    opts = [NGD(ours, groups(ours), lr=0.1, alpha=math.inf), torch.optim.SGD(groups(theirs), lr=0.1, momentum=0.9)]
    schedules = [SCHEDULERS[name](opt) for opt in opts]
    for _ in range(7):
        for net, opt, schedule in zip((ours, theirs), opts, schedules, strict=True):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
            schedule.step()
    assert [group["lr"] for group in opts[0].param_groups] == [group["lr"] for group in opts[1].param_groups]
    assert deviation(dict(ours.named_parameters()), dict(theirs.named_parameters())) < 1e-5


@pytest.mark.parametrize("other", ["sgd", "adamw"])
@pytest.mark.parametrize("method", [NGD, KFAC, SKFAC, Eva, Shampoo])
def test_one_cycle_moves_the_momentum(method: Any, other: str) -> None:
    """betas belong to groups of AdamW alone: as a default they would be what the scheduler moves."""
    model, (x, y) = build_model(), data()
    if method is Shampoo:
        matrices = [p for p in model.parameters() if p.dim() > 1]
        rest = {"params": [p for p in model.parameters() if p.dim() == 1], "rule": other}
        opt = Shampoo([{"params": matrices}, rest], lr=0.1)
    else:
        opt = method(model, lr=0.1, other=other)
    groups = opt.param_groups
    assert all(("betas" in group) == (group["rule"] == "adamw") for group in groups)
    assert {group["rule"] for group in groups} == {"sgd", other}
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=[0.1] * len(groups), total_steps=8)
    momenta = []
    for _ in range(7):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        momenta.append(groups[0]["momentum"])
        schedule.step()
    assert momenta[0] == pytest.approx(0.95)
    assert min(momenta) == pytest.approx(0.85, abs=0.01)
    assert all(group["betas"] == (0.9, 0.999) for group in groups if "betas" in group)


def test_plateau_and_a_rate_in_a_tensor() -> None:
    model, (x, y) = build_model(), data()
    opt = NGD(model, lr=torch.tensor(0.1), kl_clip=1e-3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        schedule.step(1.0)
    assert float(opt.param_groups[0]["lr"]) < 0.1
