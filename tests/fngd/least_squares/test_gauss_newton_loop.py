"""Gauss–Newton as an optimiser in a loop: groups, frozen parameters, schedulers, resuming."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from residuals import DAMPING, WEIGHTS, close, dense_direction, dense_rows, flat, problem
from torch import Tensor, nn

from fngd import GaussNewton
from fngd.least_squares.systems import SketchOptions

FORMS = {
    "rows": {"gram": "rows"},
    "rows in chunks": {"gram": "rows", "chunk_size": 3},
    "factored": {"gram": "factored"},
    "factored in chunks": {"gram": "factored", "chunk_size": 3},
    "parameters": {"solve": "parameters"},
    "parameters in chunks": {"solve": "parameters", "chunk_size": 3},
    "sketch": {"solve": "sketch", "chunk_size": 3, "sketch": SketchOptions(rank=6, tolerance=1e-11)},
}


def with_constant(closure: Callable[[], dict[str, Tensor]], place: int, constant: Tensor) -> dict[str, Tensor]:
    """The closure's groups and a constant one at that place."""
    groups = list(closure().items())
    return dict([*groups[:place], ("constant", constant), *groups[place:]])


@pytest.mark.parametrize(("place", "kind"), [(0, "detached"), (1, "of points"), (2, "detached")])
@pytest.mark.parametrize("form", FORMS)
def test_a_constant_group_has_zero_rows(form: str, place: int, kind: str) -> None:
    """It counts in the loss and moves nothing: the step is that of the dense system, in which its rows are zeros."""
    net, inner = problem(interior=4, boundary=2)
    values = torch.randn(5).double()
    points = values.clone().requires_grad_()

    def closure() -> dict[str, Tensor]:
        return with_constant(inner, place, values.sin() if kind == "detached" else points.sin())

    rows, s = dense_rows(net, closure)
    assert int((rows == 0).all(1).sum()) == len(values)
    before = flat(net.parameters())
    opt = GaussNewton(net, damping=DAMPING, weights=WEIGHTS, line_search=False, check=False, **FORMS[form])
    assert float(opt.step(closure)) == pytest.approx(float(s.square().sum() / 2), rel=1e-12)
    close(before - flat(net.parameters()), dense_direction(rows, s))


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_group_beside_unused_parameters(form: str) -> None:
    """Neither their infinity nor their having no entries reaches the group."""
    net, inner = problem(interior=4, boundary=2)
    unused = [nn.Parameter(each.double()) for each in (torch.full((2,), torch.inf), torch.empty(0), torch.ones(()))]
    opt = GaussNewton([*unused, *net.parameters()], damping=DAMPING, weights=WEIGHTS, **FORMS[form])

    def closure() -> dict[str, Tensor]:
        return with_constant(inner, 1, torch.ones(4).double())

    found = opt.direction(closure)
    assert not any(part.any() for part in found[: len(unused)])
    close(flat(found[len(unused) :]), dense_direction(*dense_rows(net, closure)))


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
