"""Gauss–Newton: its direction is the dense one, whatever form, chunks or derivatives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from residuals import DAMPING, WEIGHTS, by_autograd, close, dense_direction, dense_rows, flat, network, problem
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, jvp, vmap

from fngd import GaussNewton
from fngd.least_squares.jacobian import Jacobian
from fngd.least_squares.residuals import read_residuals
from fngd.least_squares.systems import SketchOptions

# functorch's own forward-mode rules
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def by_hessian(net: nn.Module, points: Tensor) -> Tensor:
    return vmap(lambda x: hessian(lambda y: net(y).squeeze())(x).trace() + net(x).squeeze() ** 2)(points)


def by_jvp(net: nn.Module, points: Tensor) -> Tensor:
    total = net(points).squeeze(1) ** 2
    for direction in torch.eye(points.shape[1], dtype=points.dtype):
        v = direction.expand_as(points)
        total = total + jvp(lambda x, v=v: jvp(net, (x,), (v,))[1], (points,), (v,))[1].squeeze(1)
    return total


DERIVATIVES = {"autograd": by_autograd, "hessian": by_hessian, "jvp": by_jvp}


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


@pytest.mark.parametrize("form", FORMS)
def test_accelerated_path_is_the_dense_one(form: str) -> None:
    """θ − t·d − t²·c, where J c fits half of the second derivative of s along d; exact, as s is quadratic."""
    torch.manual_seed(2)
    w, a, q = nn.Parameter(torch.randn(4).double()), torch.randn(9, 4).double(), 0.03 * torch.randn(9, 4, 4).double()
    start = w.detach().clone()

    def residuals(v: Tensor) -> Tensor:
        return a @ v + torch.einsum("bij,i,j->b", q, v, v) - 1

    rows, s = jacrev(residuals)(start) / 3, residuals(start) / 3  # √B = 3
    d = dense_direction(rows, s)
    c = dense_direction(rows, torch.einsum("bij,i,j->b", q, d, d) / 3)
    opt = GaussNewton([w], damping=DAMPING, **FORMS[form])
    opt.step(lambda: residuals(w))
    assert opt.info is not None
    t = opt.info.step_size
    assert t == 1
    close(start - w.detach(), t * d + t**2 * c)
    assert torch.linalg.vector_norm(c) > 0.01 * torch.linalg.vector_norm(d)


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


def test_sketch_states_its_error() -> None:
    """In every mode of the dense matrix the direction is right to 1e-8 where iterations are not cut short."""
    net, closure = problem(interior=60, boundary=20)
    rows, s = dense_rows(net, closure)
    matrix = rows.T @ rows + DAMPING * torch.eye(rows.shape[1]).double()
    _, modes = torch.linalg.eigh(matrix)
    for iterations, bound in ((1, 1.0), (300, 1e-10)):
        options = SketchOptions(rank=12, tolerance=1e-13, iterations=iterations)
        opt = GaussNewton(
            net, damping=DAMPING, max_samples=20, weights=WEIGHTS, sketch=options, line_search=False, lr=1e-12
        )
        direction = flat(opt.direction(closure))
        opt.step(closure)
        assert opt.info is not None
        assert opt.info.method == "sketch"
        assert opt.info.error is not None
        assert 0 < opt.info.error <= bound
        left = rows.T @ s - matrix @ direction
        error = (torch.linalg.vector_norm(left) / torch.linalg.vector_norm(rows.T @ s)).item()
        assert opt.info.error == pytest.approx(error, rel=1e-3, abs=1e-9)
        if iterations == 1:
            assert error > 1e-6
        else:
            difference = modes.T @ (direction - dense_direction(rows, s))
            assert difference.abs().max() <= 1e-8 * direction.abs().max()


def test_sums_with_random_signs_stand_for_rows() -> None:
    """With as many sums as rows they are the rows; with fewer, J̃ᵀJ̃ is JᵀJ in the mean over signs."""
    net, closure = problem(interior=24, boundary=8)
    rows, _ = dense_rows(net, closure)
    residuals = read_residuals(closure(), WEIGHTS)
    jacobian = Jacobian(residuals, list(net.parameters()), lambda: residuals)
    generator, square = torch.Generator().manual_seed(0), rows.T @ rows
    whole = jacobian.compressed(32, generator)
    torch.testing.assert_close(whole.T @ whole, square)
    draws = []
    for _ in range(400):
        sums = jacobian.compressed(8, generator)
        assert sums.shape == (8, rows.shape[1])
        draws.append(sums.T @ sums)
    off, one = (torch.linalg.matrix_norm(each - square) for each in (torch.stack(draws).mean(0), draws[0]))
    assert off < 0.1 * torch.linalg.matrix_norm(square) < one
