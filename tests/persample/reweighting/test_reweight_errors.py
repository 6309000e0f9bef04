"""reweight: errors half-way, and what comes after them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from passes import (
    CELLS,
    B,
    Branches,
    Function,
    Loop,
    Mode,
    Stop,
    branch,
    each_asking,
    every_mode,
    gradients,
    groups_of,
    same,
    squares,
    step,
    stop,
)
from torch import Tensor, nn

from persample.reweighting import reweight

pytestmark = pytest.mark.usefixtures("double")


@every_mode
def test_an_exception_in_a_hook_in_the_middle_of_a_backward_pass(mode: Mode) -> None:
    model, x = Branches(), torch.randn(B, 3)
    expected = mode.expected(model, branch(model, x, 0))
    with mode.on(model):
        loss = branch(model, x, 0).sum()
        hook = model.middle.register_hook(stop)
        with pytest.raises(Stop):
            loss.backward(retain_graph=True)
        hook.remove()
        model.zero_grad()
        loss.backward()
        same(gradients(model), expected)
        same(step(model, lambda: branch(model, x, 0)), expected)


@every_mode
def test_what_an_exception_left_is_no_part_of_another_loss(mode: Mode) -> None:
    model, x = Branches(), torch.randn(B, 3)
    expected = mode.expected(model, branch(model, x, 2))
    with mode.on(model):
        outputs = model(x)
        hook = model.middle.register_hook(stop)
        with pytest.raises(Stop):
            squares(outputs[0]).sum().backward(retain_graph=True)
        hook.remove()
        model.zero_grad()
        squares(outputs[2]).sum().backward()
    same(gradients(model), expected)


@every_mode
@pytest.mark.parametrize("at", range(3))
def test_an_exception_in_the_policy(at: int, mode: Mode) -> None:
    model, x, left = Loop(nn.Linear(6, 6)), torch.randn(B, 6), [at]
    expected = mode.expected(model, squares(model(x, 2)))

    def policy(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            raise Stop
        return mode.policy(*args)

    with reweight(model, policy, joint=mode.joint):
        loss = squares(model(x, 2)).sum()
        if mode.joint:
            left[0] = 0
        with pytest.raises(Stop):
            loss.backward(retain_graph=True)
        assert all(p.requires_grad for p in model.parameters())
        model.zero_grad()
        loss.backward()
        same(gradients(model), expected)
        same(step(model, lambda: squares(model(x, 2))), expected)


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("functions", [False, True])
@every_mode
def test_a_forward_pass_that_ends_early(mode: Mode, functions: bool, kind: type[BaseException]) -> None:
    model, x = Loop(Function() if functions else nn.Linear(6, 6)), torch.randn(B, 6)
    groups = groups_of(model, CELLS["function"][1] if functions else {})
    expected = mode.expected(model, squares(model(x, 2)), groups)

    def raises(*_: Any) -> None:
        raise kind

    with mode.on(model, functions=functions):
        for trained in (False, True):
            for where in (model, model.inp, model.head, *([] if functions else [model.cell])):
                hook = where.register_forward_pre_hook(raises)
                with pytest.raises(kind):
                    model(x, 2)
                hook.remove()
                if kind is Stop:
                    assert all(p.requires_grad and type(p) is nn.Parameter for p in model.parameters())
            if trained:
                same(step(model, lambda: squares(model(x, 2))), expected)
    assert all(p.requires_grad and type(p) is nn.Parameter for p in model.parameters())


@each_asking
def test_a_backward_pass_inside_another_through_one_graph(mode: Mode) -> None:
    model, x = Branches(), torch.randn(B, 3)
    expected = mode.expected(model, branch(model, x, 0))
    with mode.on(model):
        losses, runs = branch(model, x, 0), list[int]()
        inner = model.middle.square().sum()

        def differentiate(_: Tensor) -> None:
            runs.append(1)
            if len(runs) == 1:  # it passes by here, too
                torch.autograd.grad(inner, model.trunk.weight, retain_graph=True)

        model.middle.register_hook(differentiate)
        losses.sum().backward()
    same(gradients(model), expected)


class Twice(nn.Module):
    """Ends with a layer that it has called before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


@every_mode
def test_a_backward_pass_that_starts_at_the_layer_itself(mode: Mode) -> None:
    """The engine does not count the node it starts at among those that it runs."""
    model, x, z = Twice(), torch.randn(B, 3), torch.randn(B, 3)
    expected = mode.expected(model, (model(x) * z).sum(1))
    with mode.on(model):
        for _ in range(2):
            model.zero_grad()
            model(x).backward(z)
            same(gradients(model), expected)
