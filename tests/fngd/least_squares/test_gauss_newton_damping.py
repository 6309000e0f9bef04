"""Gauss–Newton's line search and adaptive damping: what they predict, accept and reject."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from residuals import WEIGHTS, dense_rows, flat, network, problem
from torch import Tensor, nn

from fngd import GaussNewton
from fngd.least_squares.damping import Adaptive
from fngd.least_squares.gauss_newton import RETRIES


@pytest.mark.parametrize("damping", [1e-6, lambda step: 1e-2 * 0.5**step, "adaptive", Adaptive(initial=1.0)])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_loss_never_rises_with_a_search(damping: Any, momentum: float) -> None:
    net, closure = problem(interior=20)
    opt = GaussNewton(net, damping=damping, momentum=momentum, weights=WEIGHTS)
    losses = [opt.step(closure).item() for _ in range(8)]
    assert all(b <= a for a, b in pairwise(losses))
    assert losses[-1] < 0.1 * losses[0]
    assert opt.info is not None
    assert opt.info.loss == losses[-1]
    assert opt.info.loss_after is not None


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_gain_and_adaptive_damping_are_those_of_the_dense_model(momentum: float) -> None:
    """ρ at the step taken, and λ from a multiple of tr K, against J by a loop."""
    net, closure = problem(interior=20)
    rule = Adaptive(initial=1e-3, full=1.0, good=0.9, short=0.5, decrease=0.3, increase=2.0, low=1e-10)
    opt = GaussNewton(net, damping=rule, momentum=momentum, weights=WEIGHTS, lr=0.9, acceleration=False)
    scale, steps = None, set()
    for _ in range(7):
        rows, s = dense_rows(net, closure)
        loss, trace, before = s.square().sum().item() / 2, rows.square().sum().item(), flat(net.parameters())
        expected = 1e-3 * trace if scale is None else max(scale, 1e-10 * trace)
        opt.step(closure)
        info = opt.info
        assert info is not None
        assert info.gain is not None
        assert info.retries == 0
        assert info.damping == pytest.approx(expected, rel=1e-7)
        left = s - rows @ (before - flat(net.parameters()))
        reached = dense_rows(net, closure)[1].square().sum().item() / 2
        assert info.gain == pytest.approx((loss - reached) / (loss - left.square().sum().item() / 2), rel=1e-7)
        factor = 2.0 if info.step_size < 0.5 else 0.3 if info.gain > 0.9 and info.step_size == 1 else 1.0
        scale = expected * factor
        steps.add(factor)
    assert len(steps) > 1  # both branches were met


def test_adaptive_damping_does_not_depend_on_units() -> None:
    """Residuals in other units: K and λ scale along, and the steps are the same."""
    paths = []
    for unit in (1.0, 2.0**-20):
        net, closure = problem(interior=20)
        opt = GaussNewton(net, damping="adaptive")
        for _ in range(5):
            opt.step(lambda closure=closure, unit=unit: {k: unit * r for k, r in closure().items()})
        paths.append(flat(net.parameters()))
    torch.testing.assert_close(*paths, rtol=1e-6, atol=1e-9)


def test_adaptive_damping_needs_no_tuning() -> None:
    """A curve: as good as the best of fixed dampings over ten orders of magnitude, to a factor of three in error."""
    x = torch.linspace(-3, 3, 60).double().unsqueeze(1)
    reached = {}
    for damping in ("adaptive", 1e-9, 1e-6, 1e-3, 1e-1):
        losses = []
        for seed in range(3):
            net = network(1, 6, seed)
            opt = GaussNewton(net, damping=damping)
            for _ in range(80 if damping in ("adaptive", 1e-9) else 30):  # the others are far behind by then
                loss = opt.step(lambda net=net: net(x).squeeze(1) - (2 * x).sin().squeeze(1))
            losses.append(loss.item())
        reached[damping] = sorted(losses)[1]
    assert reached["adaptive"] <= 9 * min(reached.values()), reached


def test_adaptive_damping_without_a_search_rejects_bad_steps() -> None:
    w = nn.Parameter(torch.tensor([3.0]).double())
    opt = GaussNewton([w], damping="adaptive", line_search=False)
    for _ in range(20):
        opt.step(lambda: torch.atan(w))  # the undamped step from 3 overshoots and diverges
        assert abs(w.item()) <= 3.0
    assert abs(w.item()) < 1e-6
    plain = nn.Parameter(torch.tensor([3.0]).double())
    diverging = GaussNewton([plain], damping=0.0, line_search=False)
    for _ in range(3):
        diverging.step(lambda: torch.atan(plain))
    assert abs(plain.item()) > 100


def test_no_decrease_keeps_the_parameters_and_says_so() -> None:
    w = nn.Parameter(torch.zeros(2).double())
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        return w + (1.0 if len(calls) == 1 else 5.0)  # worse wherever one looks

    opt = GaussNewton([w], momentum=0.5)
    with pytest.warns(UserWarning, match="differ between two calls"):
        opt.step(closure)
    assert opt.info is not None
    assert (opt.info.accepted, opt.info.step_size, opt.info.retries) == (False, 0.0, RETRIES)
    assert torch.equal(w.detach(), torch.zeros(2).double())


def test_a_search_passes_by_nan() -> None:
    w = nn.Parameter(torch.tensor([1.0]).double())
    opt = GaussNewton([w], damping=0.0)
    for _ in range(8):
        opt.step(lambda: torch.log(w) + 2)  # the full step from 1 leads to −1, whose logarithm is NaN
    assert abs(w.item() - math.exp(-2)) < 1e-9


def test_an_exception_in_the_search_leaves_the_parameters() -> None:
    net, closure = problem()
    before, calls = flat(net.parameters()), []

    def failing() -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        GaussNewton(net).step(failing)
    assert torch.equal(flat(net.parameters()), before)
