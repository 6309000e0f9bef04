"""Gauss–Newton as an optimiser in a loop: groups, frozen parameters, schedulers, resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from residuals import DAMPING, flat, problem
from torch import nn

from fngd import GaussNewton


def test_frozen_and_unused_parameters_stay() -> None:
    net, closure = problem()
    net[0].weight.requires_grad_(False)
    spare = nn.Parameter(torch.ones(3).double())
    opt = GaussNewton([*net.parameters(), spare], damping=1e-6)
    frozen = net[0].weight.clone()
    first, second = opt.step(closure), opt.step(closure)
    assert second < first
    assert torch.equal(net[0].weight, frozen)
    assert torch.equal(spare.detach(), torch.ones(3).double())


def test_groups_have_their_own_rate() -> None:
    net, closure = problem()
    groups = [{"params": net[0].parameters(), "lr": 0.25}, {"params": [*net[2].parameters(), *net[4].parameters()]}]
    opt = GaussNewton(groups, damping=DAMPING, line_search=False)
    expected, before = opt.direction(closure), [p.detach().clone() for p in net.parameters()]
    opt.step(closure)
    for place, (p, start, part) in enumerate(zip(net.parameters(), before, expected, strict=True)):
        torch.testing.assert_close(start - p.detach(), part * (0.25 if place < 2 else 1.0), rtol=1e-9, atol=1e-12)


def test_a_scheduler_sets_the_rate() -> None:
    net, closure = problem()
    opt = GaussNewton(net)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    opt.step(closure)
    schedule.step()
    assert opt.param_groups[0]["lr"] == 0.5
    opt.step(closure)


def test_resumes_bit_for_bit() -> None:
    net, closure = problem()
    opt = GaussNewton(net, damping="adaptive", momentum=0.5)
    for _ in range(3):
        opt.step(closure)
    saved, point = copy.deepcopy(opt.state_dict()), copy.deepcopy(net.state_dict())
    opt.step(closure)
    expected = flat(net.parameters())
    net.load_state_dict(point)
    other = GaussNewton(net, damping="adaptive", momentum=0.5)
    other.load_state_dict(saved)
    other.step(closure)
    assert torch.equal(flat(net.parameters()), expected)
    with pytest.raises(ValueError, match="no 'gauss_newton'"):
        other.load_state_dict(torch.optim.SGD(net.parameters(), lr=0.1).state_dict())
