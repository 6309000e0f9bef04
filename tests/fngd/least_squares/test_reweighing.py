"""Weights of single residuals: directions are those of the weighted matrices, and weights follow their rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from residuals import DAMPING, WEIGHTS, close, flat, network, problem
from torch import Tensor

from fngd import GaussNewton
from fngd.least_squares import CausalWeights, GroupBalance, ResidualAttention
from fngd.least_squares.systems import SketchOptions

FORMS: dict[str, dict[str, Any]] = {
    "rows": {},
    "chunks": {"chunk_size": 4},
    "factored": {"gram": "factored"},
    "parameters in chunks": {"solve": "parameters", "chunk_size": 4},
    "sketch": {"solve": "sketch", "chunk_size": 4, "sketch": SketchOptions(rank=6, tolerance=1e-11)},
}
OMEGA = {"interior": torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0, 1.5]).double(), "boundary": torch.tensor(4.0)}


def fixed(residuals: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Any]:
    return OMEGA, {"calls": state.get("calls", torch.tensor(0)) + 1}


def dense(net: Any, closure: Callable[[], dict[str, Tensor]], omega: Mapping[str, Tensor]) -> Tensor:
    """(JᵀWJ + λI)⁻¹ JᵀW r, each row of J by a backward pass, W explicitly."""
    rows, values, weights = [], [], []
    for name, group in closure().items():
        factor = omega.get(name, torch.tensor(1.0)).double() * torch.ones(len(group)).double()
        weights.append(WEIGHTS.get(name, 1.0) / len(group) * factor)
        for value in group:
            grads = torch.autograd.grad(value, list(net.parameters()), retain_graph=True, materialize_grads=True)
            rows.append(flat(grads))
            values.append(value.detach())
    J, r, W = torch.stack(rows), torch.stack(values), torch.diag(torch.cat(weights))
    return torch.linalg.solve(J.T @ W @ J + DAMPING * torch.eye(J.shape[1]).double(), J.T @ W @ r)


@pytest.mark.parametrize("form", FORMS)
def test_the_direction_is_that_of_the_weighted_matrices(form: str) -> None:
    net, closure = problem()
    opt = GaussNewton(net, damping=DAMPING, weights=WEIGHTS, reweigh=fixed, **FORMS[form])
    close(flat(opt.direction(closure)), dense(net, closure, OMEGA))
    assert opt.state_dict()["gauss_newton"]["reweigh"] == []  # a direction changes nothing
    loss = opt.step(closure)
    groups = {"interior": OMEGA["interior"], "boundary": OMEGA["boundary"].expand(3)}
    assert opt.info is not None
    assert opt.info.accepted
    net, closure = problem()
    r = {name: group.detach() for name, group in closure().items()}
    wanted = sum(WEIGHTS.get(name, 1.0) * (groups[name] * r[name] ** 2).mean() / 2 for name in r)
    assert loss.item() == pytest.approx(float(wanted), rel=1e-12)


def test_several_are_multiplied() -> None:
    net, closure = problem()
    one = lambda residuals, state: ({"boundary": 0.5 * torch.ones(3)}, state)  # noqa: E731
    opt = GaussNewton(net, damping=DAMPING, weights=WEIGHTS, reweigh=(fixed, one))
    close(flat(opt.direction(closure)), dense(net, closure, {**OMEGA, "boundary": torch.tensor(2.0)}))


def test_attention_remembers_by_its_recursion() -> None:
    rule, state, kept = ResidualAttention(memory=0.75), {}, torch.ones(3).double()
    for r in torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [3.0, 0.1, -6.0]]).double():
        weights, state = rule({"inside": r}, state)
        share = r.abs() / r.abs().max() if r.any() else torch.ones(3).double()
        kept = 0.75 * kept + 0.25 * share
        torch.testing.assert_close(weights["inside"], kept**2 / (kept**2).mean())
    torch.testing.assert_close(rule({"inside": torch.ones(5)}, state)[0]["inside"], torch.ones(5))


def test_balance_gives_all_groups_an_equal_part() -> None:
    groups = {"a": torch.tensor([3.0, 4.0]).double(), "b": torch.tensor([0.1]).double(), "c": torch.zeros(2).double()}
    weights, state = GroupBalance(memory=0.5, largest=1e3)(groups, {})
    parts = {name: weights[name] * r.square().mean() for name, r in groups.items()}
    assert parts["a"] == pytest.approx(parts["b"].item())
    assert weights["c"] == 1e3
    assert GroupBalance(memory=0.5)({**groups, "b": torch.tensor([0.3]).double()}, state)[1]["b"] == pytest.approx(0.05)


def test_causal_weights_are_those_of_the_sum_before() -> None:
    torch.manual_seed(0)
    t, r = torch.rand(200).double(), torch.randn(200).double()
    t[0], t[1] = 0.0, 1.0
    causal = CausalWeights({"inside": t}, epsilon=3.0, slices=8)
    weights, state = causal({"inside": r, "start": r}, {})
    assert list(weights) == ["inside"]
    means = [r[(t * 8).long().clamp(max=7) == k].square().mean() for k in range(8)]
    for value, place in zip(weights["inside"], (t * 8).long().clamp(max=7), strict=True):
        assert value.item() == pytest.approx(math.exp(-3 / sum(means) * sum(means[:place])))
    weights, state = causal({"inside": 1e-3 * r}, state)
    assert weights["inside"].min() > 0.99
    after, _ = causal({"inside": 1e-3 * r}, state)  # ε has grown
    torch.testing.assert_close(after["inside"], weights["inside"] ** 10)


@pytest.mark.parametrize("zeros", [ResidualAttention(), GroupBalance(), CausalWeights({"residual": torch.rand(4)})])
def test_no_residual_left_is_no_nan(zeros: Any) -> None:
    state: Any = {}
    for _ in range(400):
        weights, state = zeros({"residual": torch.zeros(4)}, state)
    assert torch.equal(weights["residual"] * torch.ones(4), torch.ones(4))


T = torch.linspace(0, 1, 30).double().unsqueeze(1).requires_grad_()


def decay(net: Any, points: Tensor = T) -> dict[str, Tensor]:
    u = net(points)
    (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    return {"inside": (slope + 5 * u).squeeze(1), "start": net(points[:1]).squeeze(1) - 1}


RULES = (CausalWeights({"inside": T}), GroupBalance(), ResidualAttention())


@pytest.mark.parametrize("rules", [*RULES, RULES], ids=["causal", "balance", "attention", "all"])
def test_equations_are_solved_and_resumed_bit_for_bit(rules: Any) -> None:
    net = network(1, 8)
    opt = GaussNewton(net, reweigh=rules)
    for _ in range(10):
        opt.step(lambda: decay(net))
    saved = [p.detach().clone() for p in net.parameters()]
    state = opt.state_dict()
    for _ in range(15):
        opt.step(lambda: decay(net))
    other = network(1, 8)
    with torch.no_grad():
        for p, q in zip(other.parameters(), saved, strict=True):
            p.copy_(q)
    again = GaussNewton(other, reweigh=rules)
    again.load_state_dict(state)
    for _ in range(15):
        again.step(lambda: decay(other))
    assert torch.equal(flat(net.parameters()), flat(other.parameters()))
    with torch.no_grad():
        assert (net(T) - torch.exp(-5 * T)).abs().max() < 1e-3


def test_forgetting_begins_again() -> None:
    net = network(1, 8)
    opt = GaussNewton(net, reweigh=ResidualAttention())
    opt.step(lambda: decay(net))
    assert len(opt.state_dict()["gauss_newton"]["reweigh"][0]["inside"]) == 30
    opt.forget_weights()
    assert opt.state_dict()["gauss_newton"]["reweigh"] == []


NONSENSE: list[tuple[Any, str]] = [
    (ResidualAttention, r"give ResidualAttention\(\)"),
    (lambda residuals, state: residuals, "it must return two dicts"),
    (lambda residuals, state: ({"nowhere": 1.0}, {}), "the closure's groups"),
    (lambda residuals, state: ({"inside": torch.ones(3)}, {}), r"shape \[3\] for the group 'inside' of 30"),
    (lambda residuals, state: ({"inside": -1.0}, {}), "negative or not finite"),
    (lambda residuals, state: ({"inside": math.nan}, {}), "negative or not finite"),
    (CausalWeights({"inside": torch.rand(3)}), r"3 times for the group 'inside'.*one time for each"),
    (CausalWeights({}), "for no group"),
]


@pytest.mark.parametrize(("rule", "words"), NONSENSE)
def test_nonsense_is_a_sentence(rule: Any, words: str) -> None:
    net = network(1, 8)
    with pytest.raises((TypeError, ValueError), match=words):
        GaussNewton(net, reweigh=rule).step(lambda: decay(net))


def test_options_that_make_no_sense() -> None:
    makers: tuple[Callable[[], Any], ...] = (
        lambda: ResidualAttention(memory=1.0),
        lambda: GroupBalance(memory=-0.1),
        lambda: GroupBalance(largest=0.5),
        lambda: CausalWeights({}, epsilon=0.0),
        lambda: CausalWeights({}, slices=1),
        lambda: CausalWeights({}, growth=0.5),
    )
    for make in makers:
        with pytest.raises((TypeError, ValueError), match=r"must|give|≤"):
            make()


def test_points_that_change_within_a_step_are_told() -> None:
    net, sizes = network(1, 8), iter(range(10, 100))

    def closure() -> Tensor:
        return net(torch.rand(next(sizes), 1).double()).squeeze(1)

    with pytest.raises(ValueError, match=r"has 11 entries.*it had 10.*between steps"):
        GaussNewton(net, reweigh=ResidualAttention()).step(closure)
