"""Samples that influence each other: refused by name, or read by rows where that was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import loop_grads_of
from torch import Tensor, nn

import persample


@pytest.mark.parametrize("affine", [True, False])
def test_batch_normalisation_is_refused_by_name(affine: bool) -> None:
    model = nn.Sequential()
    model.add_module("first", nn.Linear(3, 4))
    model.add_module("norm", nn.BatchNorm1d(4, affine=affine))
    model.add_module("last", nn.Linear(4, 2))
    with pytest.raises(persample.CoupledSamplesError, match=r"in layer 'norm' \(operation NativeBatchNorm\).*eval"):
        persample.per_sample(model, lambda out, _: out.sum(1), torch.randn(5, 3))


def test_batch_normalisation_alone_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(persample.CoupledSamplesError, match="in layer '0'"):
        persample.per_sample(model, lambda out, _: out.square().sum(1), torch.randn(5, 3))
    persample.per_sample(model.eval(), lambda out, _: out.square().sum(1), torch.randn(5, 3))


def test_a_loss_normalised_over_the_batch_is_refused() -> None:
    with pytest.raises(persample.CoupledSamplesError, match=r"influence each other, in the loss \(operation"):
        persample.per_sample(nn.Linear(3, 2), lambda out, _: (out / out.norm()).sum(1), torch.randn(5, 3))


def test_rows_on_request_are_those_of_the_summed_loss() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3).double()
    psg = persample.per_sample(model, lambda out, _: out.square().sum(1), x, coupled="rows")
    hidden: list[Tensor] = []
    handle = model[0].register_forward_hook(lambda _module, _inputs, out: hidden.append(out))
    losses = model(x).square().sum(1)
    handle.remove()
    z = torch.autograd.grad(losses.sum(), hidden[0])[0]
    torch.testing.assert_close(psg.grads()["0.weight"], torch.einsum("bo,bi->boi", z, x))


def test_rows_need_the_batch_first() -> None:
    class TimeMajor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:  # [T, B, 3] -> [B, 4]
            return self.norm(self.lin(x.unflatten(1, (1, -1)).flatten(1, 2)).mean(0))

    with pytest.raises(persample.CoupledSamplesError, match="dimension 0 of its output is not the batch"):
        persample.per_sample(TimeMajor(), lambda out, _: out.square().sum(1), torch.randn(4, 5, 3), coupled="rows")


def test_losses_alone_give_the_rows_of_the_jacobian() -> None:
    """Nothing tells data from parameters there, so coupled losses have their Jacobian's rows."""
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3).double()
    losses = (model(x) / model(x).norm()).sum(1)
    rows = persample.grad(losses, model.parameters())
    for b in range(5):
        expected = torch.autograd.grad(losses[b], list(model.parameters()), retain_graph=True)
        for row, one in zip(rows, expected, strict=True):
            torch.testing.assert_close(row[b], one)


@pytest.mark.parametrize("backend", ["outputs", "vmap"])
def test_losses_centred_over_the_batch(backend: str) -> None:
    """Their sum is constant: every gradient of it vanishes, and rows of zeros would add up. `grad` has their rows."""

    def centred(outputs: Tensor, _: Any) -> Tensor:
        return outputs[:, 0] - outputs[:, 0].mean()

    with pytest.raises((persample.CheckError, persample.CoupledSamplesError, persample.UnsupportedError)):
        persample.per_sample(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), centred, torch.randn(5, 3), backend=backend)
    model = nn.Linear(3, 2)
    losses = centred(model(torch.randn(5, 3)), None)
    rows = loop_grads_of(losses, dict(model.named_parameters()))
    torch.testing.assert_close(persample.grad(losses, model.parameters()), tuple(rows.values()))
