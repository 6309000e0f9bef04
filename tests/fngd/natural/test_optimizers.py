"""FNGD and NGD in the ordinary loop: their gradients are U c, built here sample by sample."""

from __future__ import annotations

import copy

import pytest
import torch
from coefficients import assert_close, data, directions, explicit, own_gradients, run
from natural import LAYERS, matrix
from preconditioned import Net
from torch import Tensor
from torch.nn import functional as F

from fngd import FNGD, NGD, smw_coefficients

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", ["absorb", "per_layer"])
@pytest.mark.parametrize("alpha", [1e-4, 1e-2, 1.0])
def test_gradients_in_the_first_epoch_and_with_stored_coefficients(alpha: float, scale: str, reduction: str) -> None:
    model, batches = Net(), data(5, 5, 3)
    opt = FNGD(model, lr=1e-3, alpha=alpha, scale=scale, reduction=reduction, steps_per_epoch=3)
    stored = []
    for batch in batches:
        rows = own_gradients(model, batch)
        stored.append(explicit(rows, alpha, scale))
        assert_close(run(model, opt, batch, reduction), directions(rows, stored[-1], reduction))
    for coefficients, size in zip(stored, (5, 5, 3), strict=True):  # other samples, the shorter last batch too
        (batch,) = data(size)
        rows = own_gradients(model, batch)
        assert_close(run(model, opt, batch, reduction), directions(rows, coefficients, reduction))
    opt.remove()


def test_ngd_computes_anew_in_every_step_and_takes_any_batch_size() -> None:
    model = Net()
    opt = NGD(model, lr=1e-3, alpha=1e-3)
    for batch in data(4, 6, 2, 1):
        rows = own_gradients(model, batch)
        assert_close(run(model, opt, batch), directions(rows, explicit(rows, 1e-3)))


def test_without_sharing_fngd_is_ngd() -> None:
    first, batches = Net(), data(4, 5)
    second = copy.deepcopy(first)
    a, b = FNGD(first, lr=0.1, share=None), NGD(second, lr=0.1)
    for batch in batches:
        run(first, a, batch)
        run(second, b, batch)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_zero_gradients_and_a_batch_of_one() -> None:
    model = Net()
    opt = FNGD(model, lr=0.1, momentum=0.0, steps_per_epoch=2)
    before = [p.detach().clone() for p in model.parameters()]
    (model(data(4)[0][0]) * 0).sum().backward()
    opt.step()
    opt.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    (batch,) = data(1)
    rows = own_gradients(model, batch)
    got = run(model, opt, batch)
    assert_close(got, directions(rows, {layer: torch.tensor([0.01 / 1.01]) for layer in LAYERS}))
    assert all(p.isfinite().all() for p in model.parameters())


def test_accumulation_has_coefficients_for_each_backward_pass() -> None:
    model, batches = Net(), data(4, 4)
    opt = FNGD(model, lr=0.0, alpha=1e-3, steps_per_epoch=1)
    for _ in range(2):
        opt.zero_grad()
        expected: dict[str, Tensor] = {}
        for batch in batches:
            rows = own_gradients(model, batch)
            for name, value in directions(rows, explicit(rows, 1e-3)).items():
                expected[name] = expected.get(name, 0) + value
            F.cross_entropy(model(batch[0]), batch[1]).backward()
        assert_close({name: p.grad for name, p in model.named_parameters()}, expected)
        opt.step()


def test_closure_and_loss() -> None:
    model, (batch,) = Net(), data(4)
    opt = FNGD(model, lr=0.1, steps_per_epoch=1)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(8)]
    assert losses[-1] < losses[0]


def test_remove_leaves_plain_gradients() -> None:
    model, (batch,) = Net(), data(4)
    opt = FNGD(model, lr=0.0, steps_per_epoch=1)
    assert opt.explain()["conv"].startswith("plain so far")
    run(model, opt, batch)
    assert opt.explain()["conv"].startswith("reweighted")
    opt.remove()
    opt.remove()
    assert_close(run(model, opt, batch), directions(own_gradients(model, batch), {}))
    NGD(model)  # and the model is free again


def test_float32_model() -> None:
    torch.set_default_dtype(torch.float32)
    model, (batch,) = Net(), data(6)
    rows = {name: row.double() for name, row in own_gradients(model, batch).items()}
    torch.set_default_dtype(torch.float64)
    coefficients = {layer: smw_coefficients((u := matrix(rows, layer)).T @ u, alpha=1e-4) for layer in LAYERS}
    expected = directions(rows, coefficients)
    torch.set_default_dtype(torch.float32)
    got = run(model, FNGD(model, lr=0.1, alpha=1e-4, steps_per_epoch=1), batch)
    assert_close({name: grad.double() for name, grad in got.items()}, expected, tolerance=1e-4)
