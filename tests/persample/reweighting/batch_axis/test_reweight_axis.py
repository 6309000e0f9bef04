"""reweight: which axis of a layer's output counts samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from weighting import FACTORS, B, assert_same, fixed, gradients, rows_of, weighted

from persample.reweighting import reweight

pytestmark = pytest.mark.usefixtures("double")


class TimeMajor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inp(x.transpose(0, 1)).tanh()).transpose(0, 1)


def test_the_batch_axis_is_found_once() -> None:
    model, x = TimeMajor(), torch.randn(B, 5, 3)
    expected, factors = weighted(rows_of(model, x), FACTORS), FACTORS
    with reweight(model, lambda layer, grads: factors) as handle:
        model(x).sin().sum().backward()
        assert_same(gradients(model), expected)
        assert "axis 1" in handle.explain()["inp"]
        # A shorter batch of as many samples as positions would be ambiguous, had it not been decided.
        factors = torch.rand(5)
        x = torch.randn(5, 5, 3)
        model.zero_grad()
        model(x).sin().sum().backward()
        got = gradients(model)
    assert_same(got, weighted(rows_of(model, x), factors))


@pytest.mark.parametrize("axis", [1, {"inp": 1, "out": 1}])
def test_the_batch_axis_can_be_given(axis: int | dict[str, int]) -> None:
    model, x = TimeMajor(), torch.randn(B, B, 3)
    with reweight(model, fixed, batch_axis=axis):
        model(x).sin().sum().backward()
    assert_same(gradients(model), weighted(rows_of(model, x), FACTORS))


def test_rows_as_samples_where_asked_for() -> None:
    """Frames folded into the batch: with the axis given, each frame is a sample."""
    model = nn.Sequential(nn.Flatten(0, 1), nn.Conv1d(1, 2, 2))
    x = torch.randn(2, 2, 1, 3)
    with reweight(model, fixed, batch_axis={"1": 0}):
        model(x).sin().sum().backward()
    inner = nn.Sequential(model[1])
    got = {name.replace("1.", "0."): grad for name, grad in gradients(model).items()}
    assert_same(got, weighted(rows_of(inner, x.flatten(0, 1)), FACTORS))


class Coupled(TimeMajor):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Selected(nn.Module):
    """All positions but one, as rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[1:]


class Mixed(nn.Module):
    """Positions as rows, one place on: the last of each sample stands where the next sample's first should."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1).roll(1, 0))


@pytest.mark.parametrize(
    ("build", "shape", "message"),
    [
        (Coupled, (B, B, 3), r"layer 'out' counts samples: its output has shape \[4, 4, 2\].*\[0, 1\] all have"),
        (lambda: nn.Sequential(Selected(), nn.Linear(3, 2)), (B, 5, 3), "no axis before the last has that size or a m"),
        (
            lambda: nn.Sequential(Selected(), nn.Conv1d(3, 2, 1)),
            (B, 5, 3, 1),
            r"shape \[19, 2, 1\].*\{'1': 0\}\. Or leave",
        ),
        (lambda: Mixed(nn.Linear(3, 2)), (B, 5, 3), r"axis \[0\] has a multiple of it.*trial.*persample\.Folded\(\)"),
        (lambda: Mixed(nn.Conv1d(3, 2, 1)), (B, 5, 3, 1), r"of each, but a trial.*\{'layer': 0\}.*persample\.Folded"),
    ],
)
def test_an_uncertain_batch_axis_is_an_error(build: Callable, shape: tuple, message: str) -> None:
    model = build()
    with reweight(model, fixed), pytest.raises(ValueError, match=message):
        model(torch.randn(shape)).sum().backward()


def test_calls_that_do_not_have_the_axis_that_was_given() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(B, B)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x.transpose(0, 1)).tanh()[-1])

    model = Model()
    with (
        reweight(model, fixed, batch_axis=1),
        pytest.raises(ValueError, match=r"samples on axis 1.*output of shape \[4, 4\]"),
    ):
        model(torch.randn(B, 3, B)).sum().backward()


def test_misuse_is_met_with_a_sentence() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Unflatten(1, (1, 2)), nn.Conv1d(1, 1, 1))
    with reweight(model, fixed):
        with pytest.raises(ValueError, match=r"reweighted already.*remove"):
            reweight(model, fixed)
        with pytest.raises(ValueError, match="its module '0' carries hooks"):
            reweight(nn.Sequential(model[0]), fixed)
        with pytest.raises(ValueError, match=r"layer '0'.*forward was not called with a tensor.*Call the model itself"):
            model[0](torch.randn(B, 3)).sum().backward()
    with pytest.raises(ValueError, match=r"names \['1'\].*\['0', '2'\]"):
        reweight(model, fixed, batch_axis={"1": 0})
    with pytest.raises(ValueError, match="has its samples on axis 0"):
        reweight(model, fixed, batch_axis={"2": 1})
    with pytest.raises(ValueError, match="count axes from the front"):
        reweight(model, fixed, batch_axis=-1)
    for wrong, name in ((torch.ones(B + 1), r"shape \[5\]"), (2.0, "float")):
        with reweight(model, lambda layer, grads, c=wrong: c), pytest.raises(ValueError, match=f"{name} for layer '2'"):
            model(torch.randn(B, 3)).sum().backward()


def test_a_layer_called_with_other_samples_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sum() + self.layer(x[1:]).sum()

    model = Twice()
    with reweight(model, fixed), pytest.raises(ValueError, match=r"batches of \[3, 4\] samples"):
        model(torch.randn(B, 3)).backward()
