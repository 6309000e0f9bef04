"""The `vmap` backend: randomness, buffers, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from capturing import X, network, squares, state
from oracle import loop_grads
from torch import Tensor, nn

import persample


def test_vmap_randomness() -> None:
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 2)).double()
    same = X[:1].repeat(6, 1)
    with pytest.raises(persample.UnsupportedError, match=r"randomness='different'.*'same'") as refusal:
        persample.per_sample(model, squares, same, backend="vmap")
    assert isinstance(refusal.value.__cause__, RuntimeError)
    spread = {}
    for randomness in ("same", "different"):
        psg = persample.per_sample(model, squares, same, backend="vmap", randomness=randomness)
        assert any("check skipped" in note for note in psg.notes)
        spread[randomness] = float(psg.grads()["0.weight"].std(0).max())
    assert spread["same"] < 1e-12 < spread["different"]
    with pytest.raises(ValueError, match="randomness must be one of 'error', 'same', 'different'; got 'maybe'"):
        persample.per_sample(model, squares, same, backend="vmap", randomness="maybe")


def test_vmap_checks_models_without_dropout_whatever_the_option() -> None:
    assert not persample.per_sample(network(), squares, X, backend="vmap", randomness="different").notes


def test_vmap_refuses_changes_of_buffers_and_undoes_them() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).double()
    before = state(model)
    with pytest.raises(persample.UnsupportedError, match=r"changes buffers \('1\.running_mean'.*eval"):
        persample.per_sample(model, squares, X, backend="vmap")
    assert state(model) == before


def test_vmap_refuses_losses_that_depend_on_the_batch() -> None:
    with pytest.raises(persample.UnsupportedError, match=r"sample 0 alone has the loss.*influence each other"):
        persample.per_sample(network(), lambda out, _: squares(out, _) / len(out), X, backend="vmap")


def test_vmap_refuses_another_layout() -> None:
    loss = lambda out, _: out.square().sum((0, 2))  # noqa: E731
    with pytest.raises(persample.UnsupportedError, match="outputs"):
        persample.per_sample(network(), loss, X.view(2, 3, 4), backend="vmap")
    with pytest.raises(persample.UnsupportedError, match=r"no tensor with 3 samples"):
        persample.per_sample(network(), loss, X.view(2, 3, 4)[:1], backend="vmap")


def test_vmap_keeps_the_cause() -> None:
    with pytest.raises(persample.UnsupportedError, match="functorch cannot batch") as refusal:
        persample.per_sample(network(), lambda out, _: squares(out, _) * float(out.detach()[0, 0] > -1e9), X,
                             backend="vmap")  # fmt: skip
    assert refusal.value.__cause__ is not None


def test_vmap_reports_unused_parameters() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(2, 2)}).double()
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    psg = persample.per_sample(model, squares, X, backend="vmap")
    assert psg.unused == ("idle.weight", "idle.bias")


class Tied(nn.Module):
    """A module with two names, and a parameter of two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again, self.other = self.first, nn.Linear(4, 4)
        self.other.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.again(self.first(x).sin()).cos())


def test_vmap_leaves_parameters_of_a_module_with_two_names() -> None:
    model = Tied().double()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    expected = loop_grads(model, squares, X, None)
    for _ in range(2):
        found = persample.per_sample(model, squares, X, backend="vmap").grads()
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
        assert found.keys() == expected.keys()
        for name, rows in found.items():
            torch.testing.assert_close(rows, expected[name])


class Inside(nn.Module):
    """Layers between which numbers have another precision, as in Hugging Face's RMSNorm."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.second, self.dtype = nn.Linear(64, 64), nn.Linear(64, 64), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).to(self.dtype).softmax(-1).to(x.dtype))


@pytest.mark.parametrize(("outside", "inside"), [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)])
def test_vmap_allows_for_the_precision_inside(outside: torch.dtype, inside: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Inside(inside).to(outside), torch.randn(6, 9, 64, dtype=outside)
    scaled = lambda out, _: out.square().flatten(1).sum(1)  # noqa: E731
    found = persample.per_sample(model, scaled, x, backend="vmap").grads()
    for name, rows in loop_grads(model, scaled, x, None).items():
        assert (found[name] - rows).norm() < 10 * torch.finfo(inside).eps * rows.norm()
