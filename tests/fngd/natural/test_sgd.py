"""With infinite damping NGD and FNGD are torch's SGD step for step, whatever its options and groups."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from coefficients import data, run
from preconditioned import Net

from fngd import FNGD, NGD

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("kind", ["fngd", "ngd"])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 1e-2},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
        {"momentum": 0.0, "weight_decay": 1e-2},
    ],
)
def test_heavy_damping_is_torch_sgd_step_for_step(kind: str, options: dict[str, Any]) -> None:
    plain, batches = Net(), data(5, 5, 2)
    model = copy.deepcopy(plain)
    more = {"steps_per_epoch": 3} if kind == "fngd" else {}
    opt = {"fngd": FNGD, "ngd": NGD}[kind](model, lr=0.1, alpha=math.inf, **options, **more)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, **options)
    for batch in batches * 3:
        run(model, opt, batch)
        run(plain, sgd, batch)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_decoupled_weight_decay_is_that_of_adamw() -> None:
    plain, batches = Net(), data(5, 5)
    model = copy.deepcopy(plain)
    opt = NGD(model, lr=0.1, alpha=math.inf, weight_decay=0.03, decoupled_weight_decay=True)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for batch in batches * 2:
        run(model, opt, batch)
        before = [p.detach().clone() for p in plain.parameters()]
        run(plain, sgd, batch)
        with torch.no_grad():
            for p, old in zip(plain.parameters(), before, strict=True):
                p.sub_(0.1 * 0.03 * old)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_parameter_groups_and_schedulers() -> None:
    plain, batches = Net(), data(4, 4, 4, 4)
    model = copy.deepcopy(plain)

    def groups(net: Net) -> list[dict[str, Any]]:
        head = list(net.head.parameters())
        rest = [p for p in net.parameters() if all(p is not h for h in head)]
        return [{"params": rest, "weight_decay": 0.1}, {"params": head, "lr": 0.5, "momentum": 0.0}]

    opt = FNGD(model, groups(model), lr=0.1, alpha=math.inf, steps_per_epoch=4)
    sgd = torch.optim.SGD(groups(plain), lr=0.1, momentum=0.9)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(each, max_lr=[0.3, 0.1], total_steps=4, cycle_momentum=False)
        for each in (opt, sgd)
    ]
    for batch in batches:
        run(model, opt, batch)
        run(plain, sgd, batch)
        for scheduler in schedulers:
            scheduler.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
