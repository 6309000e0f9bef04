"""Gauss–Newton's closure is called several times in a step: it draws the same numbers, or is told that it does not."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from residuals import flat, network
from torch import Tensor, nn

from fngd import GaussNewton

FORMS: dict[str, dict[str, Any]] = {
    "rows": {},
    "chunks": {"chunk_size": 7},
    "sketch": {"solve": "sketch"},
    "factored": {"gram": "factored"},
    "parameters in chunks": {"solve": "parameters", "chunk_size": 7},
}
X = torch.linspace(-1, 1, 20).double().unsqueeze(1)


def steps(opt: GaussNewton, closure: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        opt.step(closure)


@pytest.mark.parametrize("damping", ["adaptive", 1e-8])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_is_retried_is_that_of_rows(form: str, damping: Any) -> None:
    """J is used again after the search has looked at other places, in vain for the first 40 of them."""
    ends = []
    for options in ({}, FORMS[form]):
        net, tried = network(1, 5), []
        start = flat(net.parameters())

        def closure(net: nn.Module = net, start: Tensor = start, tried: list[int] = tried) -> Tensor:
            tried += [1] * (not torch.equal(flat(net.parameters()), start))
            worse = 9.0 if 1 <= len(tried) < 40 else 0.0
            return net(X).squeeze(1) - X.sin().squeeze(1) + worse

        opt = GaussNewton(net, damping=damping, check=False, acceleration=False, **options)
        opt.step(closure)
        assert opt.info is not None
        assert opt.info.retries == 1
        assert opt.info.accepted
        ends.append(flat(net.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_solved_already(form: str) -> None:
    net = network(1, 5)
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    before = flat(net.parameters())
    opt = GaussNewton(net, **FORMS[form])
    for _ in range(10):
        assert opt.step(lambda: net(X).squeeze(1)) == 0
    assert torch.equal(flat(net.parameters()), before)


DRAWN: dict[str, Callable[[], Tensor]] = {
    "torch": lambda: torch.rand(20, 1).double(),
    "numpy": lambda: torch.from_numpy(np.random.rand(20, 1)),  # noqa: NPY002
    "python": lambda: torch.tensor([[random.random()] for _ in range(20)], dtype=torch.float64),
}


@pytest.mark.parametrize("source", DRAWN)
@pytest.mark.parametrize("form", FORMS)
def test_points_drawn_in_the_closure_are_one_set_a_step(source: str, form: str) -> None:
    """The steps are those on points that were drawn before, and the generators go on as after one call a step."""
    ends, drawn = [], []
    for inside in (True, False):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        net, first = network(1, 5), []
        opt = GaussNewton(net, **FORMS[form])
        for _ in range(6):
            before = len(drawn)
            points = None if inside else drawn.pop(0)

            def closure(net: Any = net, points: Any = points, before: int = before, first: Any = first) -> Tensor:
                x = DRAWN[source]() if points is None else points
                first.append(x[0].item())
                drawn.extend([x] * (points is None and len(drawn) == before))
                return net(x).squeeze(1) - torch.sin(3 * x).squeeze(1)

            opt.step(closure)
        assert len(set(first)) == 6
        ends.append(flat(net.parameters()))
        if inside and source != "python":  # which the type checks of these tests draw from, too
            following = DRAWN[source]()
    assert torch.equal(*ends)
    if source != "python":
        np.random.seed(3)  # noqa: NPY002
        network(1, 5)  # seeds torch's
        for _ in range(6):
            DRAWN[source]()
        assert torch.equal(DRAWN[source](), following)


def test_points_of_a_generator_of_its_own_are_noticed_once() -> None:
    net, own = network(1, 5), torch.Generator().manual_seed(0)

    def closure() -> Tensor:
        x = torch.rand(20, 1, generator=own).double()
        return net(x).squeeze(1) - x.sin().squeeze(1)

    opt = GaussNewton(net)
    with pytest.warns(UserWarning, match=r"differ between two calls .*residual.*Draw these between steps") as said:
        steps(opt, closure, 40)
    assert sum("differ" in str(each.message) for each in said) == 1


def test_as_many_points_as_it_likes_are_noticed() -> None:
    net, sizes = network(1, 5), iter(range(10, 10_000))

    def closure() -> Tensor:
        x = torch.linspace(-1, 1, next(sizes)).double().unsqueeze(1)
        return net(x).squeeze(1) - x.sin().squeeze(1)

    with pytest.warns(UserWarning, match=r"\{'residual': 10\}, then \{'residual': 11\}"):
        GaussNewton(net).step(closure)


@pytest.mark.parametrize("options", [{}, {"acceleration": False}, {"damping": 1e-6}, {"line_search": False}])
def test_a_prediction_from_outside_is_told(options: dict[str, Any]) -> None:
    net = network(1, 5)
    outside, before = net(X).squeeze(1), flat(net.parameters())
    with pytest.raises(ValueError, match=r"group 'residual' is the same at other parameters.*opt\.step\(lambda"):
        GaussNewton(net, **options).step(lambda: outside - X.sin().squeeze(1))
    assert torch.equal(flat(net.parameters()), before)
    opt = GaussNewton(net)
    outside = net(X[:1]).squeeze(1)
    with pytest.raises(ValueError, match="group 'edge' is the same"):
        opt.step(lambda: {"inside": net(X).squeeze(1) - 1, "edge": outside - 2})


def test_a_prediction_from_outside_is_right_where_nothing_looks_ahead() -> None:
    net = network(1, 5)
    opt = GaussNewton(net, damping=1e-2, line_search=False)
    for _ in range(10):
        residual = net(X).squeeze(1) - X.sin().squeeze(1)
        loss = opt.step(lambda residual=residual: residual)
    assert loss < 1e-4
    with pytest.raises(ValueError, match="call it within"):
        opt.step(lambda: residual)  # its graph is that of the step before


def test_points_overwritten_in_the_closure() -> None:
    net = network(1, 5)
    points = torch.empty(20, 1).double()

    def closure() -> Tensor:
        points.uniform_()
        return net(points).squeeze(1) - points.sin().squeeze(1).detach()

    losses = [GaussNewton(net).step(closure).item() for _ in range(3)]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="writes to its points or buffers in place"):
        GaussNewton(net, chunk_size=5).step(closure)


def test_converged_to_rounding_is_no_stall() -> None:
    for dtype in (torch.float64, torch.float32):
        net = network(1, 12).to(dtype)
        x = X.to(dtype)
        opt = GaussNewton(net)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(120):
                loss = opt.step(lambda net=net, x=x: net(x).squeeze(1) - torch.sin(3 * x).squeeze(1))
        assert loss < (1e-14 if dtype == torch.float64 else 1e-9)


def test_no_progress_is_said_once_with_what_to_try() -> None:
    w = nn.Parameter(torch.tensor([1.0]).double())
    opt = GaussNewton([w], damping=0.0)
    with pytest.warns(UserWarning, match=r"makes no progress.*damping='adaptive'.*another random start") as said:
        steps(opt, lambda: torch.where(w == 1, w, w + 2), 60)  # worse wherever one looks
    assert len(said) == 1
