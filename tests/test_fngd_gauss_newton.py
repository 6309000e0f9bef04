"""Gauss–Newton: its direction is the dense one, whatever form, chunks or derivatives; misuse gets a sentence."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, jvp, vmap

from fngd import GaussNewton
from fngd.damping import Adaptive
from fngd.gauss_newton import RETRIES
from fngd.systems import SketchOptions

# functorch's own forward-mode rules
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

WEIGHTS = {"boundary": 7.0}
DAMPING = 1e-3


def network(inputs: int = 2, width: int = 5, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    ).double()


def by_autograd(net: nn.Module, points: Tensor) -> Tensor:
    points = points.clone().requires_grad_()
    value = net(points)
    (slope,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    second = [torch.autograd.grad(s.sum(), points, create_graph=True)[0][:, i] for i, s in enumerate(slope.T)]
    return sum(second, value.squeeze(1) ** 2)


def by_hessian(net: nn.Module, points: Tensor) -> Tensor:
    return vmap(lambda x: hessian(lambda y: net(y).squeeze())(x).trace() + net(x).squeeze() ** 2)(points)


def by_jvp(net: nn.Module, points: Tensor) -> Tensor:
    total = net(points).squeeze(1) ** 2
    for direction in torch.eye(points.shape[1], dtype=points.dtype):
        v = direction.expand_as(points)
        total = total + jvp(lambda x, v=v: jvp(net, (x,), (v,))[1], (points,), (v,))[1].squeeze(1)
    return total


DERIVATIVES = {"autograd": by_autograd, "hessian": by_hessian, "jvp": by_jvp}


def problem(laplacian: Callable = by_autograd, interior: int = 6, boundary: int = 3, seed: int = 0) -> tuple[Any, Any]:
    net = network(seed=seed)
    inside, edge = torch.rand(interior, 2).double(), torch.rand(boundary, 2).double()

    def closure() -> dict[str, Tensor]:
        return {"interior": laplacian(net, inside) + 1, "boundary": net(edge).squeeze(1)}

    return net, closure


def dense_rows(net: nn.Module, closure: Callable[[], dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """J and s, one backward pass for each row."""
    groups = closure()
    scaled = torch.cat([math.sqrt(WEIGHTS.get(name, 1.0) / len(r)) * r for name, r in groups.items()])
    rows = []
    for value in scaled:
        grads = torch.autograd.grad(value, list(net.parameters()), retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows), scaled.detach()


def dense_direction(rows: Tensor, s: Tensor, previous: Tensor | None = None, momentum: float = 0.0) -> Tensor:
    """argmin ‖J d − s‖² + λ‖d − μφ‖², as one tall least-squares problem: neither J Jᵀ nor JᵀJ."""
    start = momentum * previous if previous is not None else torch.zeros(rows.shape[1]).double()
    tall = torch.cat([rows, math.sqrt(DAMPING) * torch.eye(rows.shape[1]).double()])
    return torch.linalg.lstsq(tall, torch.cat([s, math.sqrt(DAMPING) * start])).solution


def flat(parts: tuple[Tensor, ...] | Any) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])


def close(actual: Tensor, expected: Tensor) -> None:
    assert torch.linalg.vector_norm(actual - expected) <= 1e-8 * torch.linalg.vector_norm(expected)


FORMS = {
    "rows": {"gram": "rows"},
    "chunks": {"gram": "rows", "chunk_size": 4},
    "chunks with a rest": {"chunk_size": 7},
    "factored": {"gram": "factored"},
    "factored chunks": {"gram": "factored", "chunk_size": 4},
    "parameters": {"solve": "parameters"},
    "parameters in chunks": {"solve": "parameters", "chunk_size": 4},
    "sketch": {"solve": "sketch", "chunk_size": 4, "sketch": SketchOptions(rank=6, tolerance=1e-11)},
}


@pytest.mark.parametrize(
    ("form", "derivatives"),
    [(form, "autograd") for form in FORMS]
    + [(form, kind) for form in ("rows", "factored") for kind in ("hessian", "jvp")],
)
def test_direction_is_dense_gauss_newton(form: str, derivatives: str) -> None:
    net, closure = problem(DERIVATIVES[derivatives])
    opt = GaussNewton(net, damping=DAMPING, weights=WEIGHTS, **FORMS[form])
    close(flat(opt.direction(closure)), dense_direction(*dense_rows(net, closure)))


@pytest.mark.parametrize("form", FORMS)
def test_momentum_is_spring(form: str) -> None:
    net, closure = problem()
    opt = GaussNewton(net, damping=DAMPING, momentum=0.8, line_search=False, lr=0.3, weights=WEIGHTS, **FORMS[form])
    previous = None
    for _ in range(2):
        expected = dense_direction(*dense_rows(net, closure), previous, 0.8)
        close(flat(opt.direction(closure)), expected)
        before = flat(net.parameters())
        opt.step(closure)
        close(before - flat(net.parameters()), 0.3 * expected)
        previous = expected


@settings(max_examples=8)
@given(interior=st.integers(1, 6), boundary=st.integers(1, 6), chunk=st.integers(2, 7), seed=st.integers(0, 9))
def test_direction_for_any_sizes(interior: int, boundary: int, chunk: int, seed: int) -> None:
    net, closure = problem(interior=interior, boundary=boundary, seed=seed)
    opt = GaussNewton(net, damping=DAMPING, weights=WEIGHTS, chunk_size=chunk)
    close(flat(opt.direction(closure)), dense_direction(*dense_rows(net, closure)))


def test_many_residuals_take_the_symmetric_product() -> None:
    net, closure = problem(interior=300, boundary=30)
    expected = dense_direction(*dense_rows(net, closure))
    for solve in ("samples", "parameters"):
        opt = GaussNewton(net, damping=DAMPING, weights=WEIGHTS, solve=solve)
        close(flat(opt.direction(closure)), expected)


def test_residuals_that_share_the_batch() -> None:
    """r − mean(r) is no function of one point; a row of J is still a row of J."""
    net, x = network(), torch.rand(6, 2).double()

    def closure() -> dict[str, Tensor]:
        out = net(x).squeeze(1)
        return {"centred": out - out.mean()}

    opt = GaussNewton(net, damping=DAMPING)
    close(flat(opt.direction(closure)), dense_direction(*dense_rows(net, closure)))


def test_a_functional_model_and_vector_valued_residuals() -> None:
    net, x = network(), torch.rand(5, 2).double()

    def closure() -> dict[str, Tensor]:
        slope = vmap(jacrev(lambda point: functional_call(net, dict(net.named_parameters()), (point,)).squeeze()))(x)
        return {"slope": (slope - 1).flatten()}

    opt = GaussNewton(net, damping=DAMPING)
    close(flat(opt.direction(closure)), dense_direction(*dense_rows(net, closure)))


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
    opt = GaussNewton(net, damping=rule, momentum=momentum, weights=WEIGHTS, lr=0.9)
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
            for _ in range(40):
                loss = opt.step(lambda net=net: net(x).squeeze(1) - (2 * x).sin().squeeze(1))
            losses.append(loss.item())
        reached[damping] = sorted(losses)[1]
    assert reached["adaptive"] <= 9 * min(reached.values()), reached


def test_derivatives_that_are_not_finite_are_named() -> None:
    w = nn.Parameter(torch.zeros(2).double())
    for options in ({}, {"solve": "parameters"}, {"solve": "sketch"}):
        with pytest.raises(ValueError, match="not finite"):
            GaussNewton([w], check=False, **options).step(lambda: torch.sqrt(w) + 1)
    assert torch.equal(w.detach(), torch.zeros(2).double())


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


@pytest.mark.parametrize("solve", ["samples", "parameters"])
def test_singular_matrix_without_damping_gives_the_least_norm(solve: str) -> None:
    net = nn.Linear(3, 1).double()
    x = torch.randn(4, 3).double()
    x = torch.cat([x, x])  # every row twice

    def closure() -> dict[str, Tensor]:
        return {"r": net(x).squeeze(1) - 1}

    opt = GaussNewton(net, damping=0.0, solve=solve)
    rows, s = dense_rows(net, closure)
    got = flat(opt.direction(closure))
    close(got, torch.linalg.pinv(rows, rtol=1e-10) @ s)
    opt.step(closure)
    assert opt.info is not None
    assert "eigenvalues" in opt.info.method or solve == "parameters"


def test_vanished_jacobian_and_vanished_residuals() -> None:
    w = nn.Parameter(torch.zeros(2).double())
    opt = GaussNewton([w], damping=0.0)
    opt.step(lambda: w**2 + 1)  # J = 0
    assert torch.equal(w.detach(), torch.zeros(2).double())
    assert opt.step(lambda: w) == 0
    assert torch.equal(w.detach(), torch.zeros(2).double())


def test_one_residual_and_one_parameter() -> None:
    w = nn.Parameter(torch.tensor([4.0]).double())
    opt = GaussNewton([w], damping=0.0)
    opt.step(lambda: 2 * w - 2)
    assert abs(w.item() - 1) < 1e-14


def test_float32_parameters_are_solved_in_float64() -> None:
    net, x = network(), torch.rand(30, 2).double()
    expected = dense_direction(*dense_rows(net, lambda: {"r": by_autograd(net, x) + 1}))
    single = copy.deepcopy(net).float()
    got = GaussNewton(single, damping=DAMPING).direction(lambda: by_autograd(single, x.float()) + 1)
    assert {part.dtype for part in got} == {torch.float32}
    assert torch.linalg.vector_norm(flat(got) - expected) < 1e-2 * torch.linalg.vector_norm(expected)
    opt = GaussNewton(single, damping=0.0)  # K is indefinite by rounding, were λ not raised to ε·tr(K)
    losses = [opt.step(lambda: by_autograd(single, x.float()) + 1) for _ in range(6)]
    assert losses[-1] < 0.5 * losses[0]


def test_sketch_states_its_error() -> None:
    net, closure = problem(interior=60, boundary=20)
    rows, s = dense_rows(net, closure)
    kernel = rows @ rows.T + DAMPING * torch.eye(len(s)).double()
    for iterations, bound in ((1, 1.0), (300, 1e-9)):
        options = SketchOptions(rank=12, tolerance=1e-9, iterations=iterations)
        opt = GaussNewton(net, damping=DAMPING, max_samples=20, weights=WEIGHTS, sketch=options, lr=1e-9)
        direction = flat(opt.direction(closure))
        coefficients = (s - rows @ direction) / DAMPING  # as d = Jᵀa and (K + λI)a ≈ s
        opt.step(closure)
        assert opt.info is not None
        assert opt.info.method == "nystrom"
        assert opt.info.error is not None
        assert 0 < opt.info.error <= bound
        if iterations == 1:  # a itself is not returned; K's part of the error is
            left = torch.linalg.vector_norm(kernel @ coefficients - s) / torch.linalg.vector_norm(s)
            assert left > 1e-6
        else:
            close(direction, dense_direction(rows, s))


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


def test_a_scheduler_sets_the_rate() -> None:
    net, closure = problem()
    opt = GaussNewton(net)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    opt.step(closure)
    schedule.step()
    assert opt.param_groups[0]["lr"] == 0.5
    opt.step(closure)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr=0.0; it must be > 0"),
        ({"damping": -1.0}, "damping=-1.0; it must be ≥ 0"),
        ({"damping": "lm"}, "damping='lm' is unknown"),
        ({"momentum": 1.0}, r"momentum=1.0; it must be in \[0, 1\)"),
        ({"gram": "dense"}, "gram='dense' is unknown; choose one of"),
        ({"solve": "cg"}, "solve='cg' is unknown; choose one of"),
        ({"gram": "factored", "solve": "sketch"}, "leave one of them out"),
        ({"chunk_size": 0}, "chunk_size=0; it must be an integer ≥ 1"),
        ({"max_samples": -1}, "max_samples=-1"),
        ({"weights": {"a": -1.0}}, r"weights\['a'\]=-1.0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussNewton(nn.Linear(2, 1), **options)


def test_option_objects_out_of_range() -> None:
    with pytest.raises(ValueError, match="decrease ≤ 1"):
        Adaptive(decrease=2.0)
    with pytest.raises(ValueError, match="sketch rank=0"):
        SketchOptions(rank=0)
    with pytest.raises(ValueError, match="tolerance=0"):
        SketchOptions(tolerance=0.0)
    with pytest.raises(ValueError, match="one real floating-point dtype"):
        GaussNewton([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1).double())])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda r: r.square().mean(), ValueError, "is a scalar: a loss, perhaps"),
        (lambda r: r.unsqueeze(1), ValueError, r"has shape \[4, 1\]; it must be \[B\]"),
        (lambda r: r[:0], ValueError, "is empty"),
        (lambda r: {}, ValueError, "no residuals"),
        (lambda r: r.detach(), ValueError, "no residual depends on a parameter"),
        (lambda r: r / 0, ValueError, "not finite at the current parameters.*residual.: 4"),
        (lambda r: r.long(), TypeError, "must be real floating-point"),
        (lambda r: 3.0, TypeError, "returned float"),
        (lambda r: [r, 3.0], TypeError, "'1' is float"),
        (lambda r: (r, r.float()), ValueError, "must have one dtype"),
    ],
)
def test_residuals_of_the_wrong_kind(change: Callable, error: type[Exception], message: str) -> None:
    net, x = network(), torch.rand(4, 2).double()
    before = flat(net.parameters())
    with pytest.raises(error, match=message):
        GaussNewton(net).step(lambda: change(net(x).squeeze(1)))
    assert torch.equal(flat(net.parameters()), before)


def test_unknown_groups_and_missing_closures() -> None:
    net, closure = problem()
    with pytest.raises(
        ValueError, match=r"weights name \['data'\]; the closure's groups are \['interior', 'boundary'\]"
    ):
        GaussNewton(net, weights={"data": 1.0}).step(closure)
    with pytest.raises(ValueError, match="needs residuals"):
        GaussNewton(net).step()
    with pytest.raises(ValueError, match=r"damping gave -1\.0 in step 0"):
        GaussNewton(net, damping=lambda step: -1.0).step(closure)
    plain = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"type nn\.Parameter"):
        GaussNewton([plain], gram="factored").step(lambda: plain * 2)
    GaussNewton([plain], gram="rows").step(lambda: plain * 2)


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
