"""`backward`: the weighted sum in `.grad`, as `loss.backward()` would put it there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from capturing import BACKENDS, needs_opacus
from oracle import rel_err
from torch import Tensor, nn

import persample
from persample.testing.cases import CASES, Case, call

pytestmark = pytest.mark.usefixtures("double")


def squares(y: Tensor, _: Any) -> Tensor:
    return y.square().flatten(1).sum(1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


X, C = torch.randn(6, 4, dtype=torch.float64), torch.linspace(-1, 2, 6, dtype=torch.float64)


@pytest.mark.parametrize("case", [case for case in CASES if not case.coupled], ids=lambda case: case.name)
def test_every_case_as_a_backward_pass(case: Case) -> None:
    model, loss_fn, inputs, targets = case.build()
    torch.manual_seed(1)
    losses = loss_fn(call(model, inputs), targets)
    if not losses.requires_grad:
        return
    c = torch.linspace(-1, 2, len(losses)).to(losses)
    (c * losses).sum().backward()
    want = {name: None if g is None else g.to_dense() for name, g in gradients(model).items()}
    model, loss_fn, inputs, targets = case.build()
    torch.manual_seed(1)
    psg = persample.per_sample(model, loss_fn, inputs, targets)
    psg.backward(c)
    got = gradients(model)
    assert {name for name, g in got.items() if g is None} >= {name for name, g in want.items() if g is None}
    tolerance = 1e-5 if "float32" in case.tags else 1e-9
    there = {name: g for name, g in got.items() if g is not None}
    expected = {name: g for name, g in want.items() if name in there and g is not None}
    assert rel_err(there, expected) < tolerance
    for name in want.keys() - there.keys():
        assert want[name] is None or not want[name].any(), name  # type: ignore[union-attr]


WAYS: dict[str, dict[str, Any]] = {
    **{backend: {"backend": backend} for backend in BACKENDS}, "graph": {"hold": "graph"}, "chunks": {"chunk_size": 4},
}  # fmt: skip


@needs_opacus
@pytest.mark.parametrize("way", WAYS)
def test_every_way(way: str) -> None:
    model, plain = network(), network()
    squares(plain(X), None).sum().backward()
    psg = persample.per_sample(model, squares, X, **WAYS[way])
    psg.backward()
    torch.testing.assert_close(gradients(model), gradients(plain))
    (C * squares(plain(X), None)).sum().backward()
    psg.backward(C)  # added to what is there
    torch.testing.assert_close(gradients(model), gradients(plain))


def test_layers_have_coefficients_of_their_own() -> None:
    model = network()
    psg = persample.per_sample(model, squares, X)
    psg.backward({"0": C, "2": 2 * C})
    torch.testing.assert_close(gradients(model), dict(psg.weighted_sum({"0": C, "2": 2 * C})))
    with pytest.raises(ValueError, match=r"shape \[B\] = \[6\]"):
        psg.backward(C[:2])


def test_what_is_frozen_or_unused_is_left_alone() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    model.register_module("spare", nn.Linear(2, 2))
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    psg = persample.per_sample(model, squares, X)
    model[0].bias.requires_grad_(False)
    psg.backward()
    assert {name for name, g in gradients(model).items() if g is not None} == {"2.weight", "2.bias"}


def test_what_is_there_is_added_to_in_place_whatever_holds_it() -> None:
    model, plain = (nn.Embedding(5, 3, sparse=sparse) for sparse in (True, False))
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(5, (4, 2))
    squares(plain(ids), None).sum().backward()
    squares(model(ids), None).sum().backward()
    persample.per_sample(model, squares, ids).backward()
    torch.testing.assert_close(model.weight.grad, 2 * plain.weight.grad)  # type: ignore[operator]
    before = model.weight.grad
    persample.per_sample(model, squares, ids).backward()
    assert model.weight.grad is before
    half = nn.Linear(4, 2).bfloat16()
    persample.per_sample(half, squares, X.bfloat16()).backward()
    assert half.weight.grad.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_hooks_run_as_in_any_pass() -> None:
    model, plain, met = network(), network(), []
    psg = persample.per_sample(model, squares, X)
    for each in (model, plain):
        each[0].weight.register_hook(lambda g: 2 * g)
        each[0].weight.register_post_accumulate_grad_hook(lambda p: met.append(p.grad.clone()))
    psg.backward()
    squares(plain(X), None).sum().backward()
    torch.testing.assert_close(gradients(model), gradients(plain))
    torch.testing.assert_close(*met)


def test_a_second_call_does_not_write_into_a_result() -> None:
    model = network()
    psg = persample.per_sample(model, squares, X)
    psg.backward(C)
    before = psg.weighted_sum(C)
    kept = copy.deepcopy(before)
    psg.backward(C)
    torch.testing.assert_close(before, kept)
    torch.testing.assert_close(psg.weighted_sum(C), kept)


def test_a_copy_has_no_parameters() -> None:
    psg = copy.deepcopy(persample.per_sample(network(), squares, X))
    with pytest.raises(RuntimeError, match=r"weighted_sum\(c\) returns into \.grad"):
        psg.backward()


def test_losses_without_a_module() -> None:
    w = torch.randn(4, requires_grad=True)
    psg = persample.from_losses((X @ w).square(), w)
    psg.backward(C)
    torch.testing.assert_close(w.grad, psg.weighted_sum(C)["0"])
