"""curvature_samples=n: factors are those of the first n samples alone, the gradient that of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from preconditioned import Net, batch, check_resume, close
from torch.nn import functional as F

from fngd import EKFAC, KFAC, MBF, SKFAC, Eva, HyLo

METHODS: dict[str, Any] = {
    "kfac": KFAC,
    "ekfac": EKFAC,
    "mbf": MBF,
    "hylo": lambda model, **o: HyLo(model, select="interpolate", rank=0.7, every=1, **o),
    "skfac": SKFAC,
    "eva": Eva,
}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", METHODS)
def test_curvature_is_that_of_the_first_samples(name: str, reduction: str) -> None:
    x, y = batch(1, 7)
    torch.manual_seed(0)
    model, part = Net(), Net()
    part.load_state_dict(model.state_dict())
    options: Any = {"lr": 0.1, "momentum": 0.0, "reduction": reduction, "kl_clip": None}
    whole = METHODS[name](model, curvature_samples=3, **options)
    first = METHODS[name](part, **options)
    F.cross_entropy(model(x), y, reduction=reduction).backward()
    F.cross_entropy(part(x[:3]), y[:3], reduction=reduction).backward()
    for p, q in zip(part.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    whole.step()
    first.step()
    for layer, state in first._running.items():
        for key, value in state.items():
            close(whole._running[layer][key].double(), value.double(), 1e-10)
    for p, q in zip(model.parameters(), part.parameters(), strict=True):
        close(p.detach(), q.detach())


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", METHODS)
def test_as_many_as_there_are_change_nothing(name: str) -> None:
    results = []
    for options in ({}, {"curvature_samples": 5}, {"curvature_samples": 50}):
        torch.manual_seed(0)
        opt = METHODS[name](model := Net(), lr=0.1, **options)
        x, y = batch(1)
        F.cross_entropy(model(x), y).backward()
        opt.step()
        results.append([p.detach() for p in model.parameters()])
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_resume_is_bit_for_bit(name: str) -> None:
    check_resume(lambda model: METHODS[name](model, lr=0.02, curvature_samples=2), 1)
