"""reweight: `.grad` is Σ_b c_b g_b, whatever the layer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from weighting import FACTORS, B, assert_same, fixed, gradients, rows_of, weighted

from persample.reweighting import LayerGrads, reweight

pytestmark = pytest.mark.usefixtures("double")

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear, no bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "linear, positions": (lambda: nn.Linear(5, 3), (6, 5)),
    "linear, many positions": (lambda: nn.Linear(2, 3), (9, 2)),
    "linear, two axes of positions": (lambda: nn.Linear(5, 3), (2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2, stride=2), (2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 5, 6)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (4, 7, 7)),
    "conv2d few positions": (lambda: nn.Conv2d(8, 9, 2), (8, 2, 2)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same"), (2, 5, 6)),
    "conv2d valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 5, 6)),
    "conv2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (2, 5, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(2, 3, 4, padding="same", padding_mode="reflect"), (2, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (2, 4)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, groups=2), (4, 3, 3)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 1, 2, dilation=2), (2, 2, 2, 2)),
}


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")  # says how torch pads
@pytest.mark.parametrize("needs_grad", [False, True], ids=["input without", "input with gradient"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_type(name: str, needs_grad: bool) -> None:
    build, shape = LAYERS[name]
    model, x = nn.Sequential(build()), torch.randn(B, *shape)
    rows = rows_of(model, x)
    flat = torch.cat([row.flatten(1) for row in rows.values()], 1)
    seen = {}

    def policy(layer: str, grads: LayerGrads) -> Tensor:
        seen.update(
            path=layer, norms=grads.norms(), gram=grads.gram(), norms_after=grads.norms(), size=grads.batch_size
        )
        assert "weight" in grads.explain()
        return FACTORS

    for use in (policy, fixed):  # with and without forming anything for the Gram matrix
        model.zero_grad()
        with reweight(model, use):
            model(x.clone().requires_grad_(needs_grad)).sin().sum().backward()
        assert_same(gradients(model), weighted(rows, FACTORS))
    assert seen["path"] == "0"
    assert seen["size"] == B
    torch.testing.assert_close(seen["gram"], flat @ flat.T)
    torch.testing.assert_close(seen["norms"], flat.norm(dim=1))
    torch.testing.assert_close(seen["norms_after"], flat.norm(dim=1))


def test_input_gradient_is_the_ordinary_one() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2)), torch.randn(B, 2, 5, 5)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(model(x).sin().sum(), x)
    with reweight(model, fixed):
        loss = model(x).sin().sum()
        (got,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert all(parameter.grad is None for parameter in model.parameters())
        loss.backward()  # what autograd.grad passed by leaves nothing behind
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(x.grad, expected)
    assert_same(gradients(model), weighted(rows_of(model, x.detach()), FACTORS))


def test_none_is_the_plain_gradient_and_other_parameters_always_get_it() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), torch.randn(B, 3)
    rows = rows_of(model, x)
    with reweight(model, lambda layer, grads: None if layer == "0" else FACTORS):
        model(x).sin().sum().backward()
    ones = torch.ones(B)
    expected = {name: weighted(rows, FACTORS if name.startswith("2") else ones)[name] for name in rows}
    assert_same(gradients(model), expected)


class Shared(nn.Module):
    """Calls each of its layers twice, convolutions with different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.relu = nn.Conv2d(2, 2, 2), nn.Linear(2, 2), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(self.relu(self.conv(x))))
        x = x.flatten(2).transpose(1, 2)
        return self.linear(self.relu(self.linear(x)))


def test_a_layer_called_twice_is_one_layer_with_one_gram_matrix() -> None:
    model, x = Shared(), torch.randn(B, 2, 5, 5)
    rows = rows_of(model, x)
    grams: dict[str, Tensor] = {}

    def policy(layer: str, grads: LayerGrads) -> Tensor:
        assert layer not in grams, "asked once"
        grams[layer] = grads.gram()
        return FACTORS

    with reweight(model, policy):
        model(x).sin().sum().backward()
    assert_same(gradients(model), weighted(rows, FACTORS))
    for layer, gram in grams.items():
        flat = torch.cat([row.flatten(1) for name, row in rows.items() if name.startswith(layer)], 1)
        torch.testing.assert_close(gram, flat @ flat.T)


class Careless(nn.Linear):
    """A subclass with a forward of its own is left alone: what it does with its weight is unknown."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)


def test_what_stays_plain_is_listed() -> None:
    parts = [nn.Linear(3, 3) for _ in range(4)]
    parts[1].requires_grad_(False)
    nn.utils.parametrizations.weight_norm(parts[2])
    model, x = nn.Sequential(*parts, Careless(3, 3), nn.Linear(3, 3)), torch.randn(B, 3)
    rows = rows_of(model, x)
    with reweight(model, fixed) as handle:
        before = handle.explain()
        model(x).sin().sum().backward()
        after = handle.explain()
    assert "not been called" in before["0"]
    assert after["0"].startswith("reweighted, samples on axis 0")
    assert "frozen" in after["1"]
    assert "parametrised" in after["2"]
    assert "4" not in after
    assert handle.layers == ("0", "3", "5")
    assert not parts[1].weight.requires_grad
    got = gradients(model)
    ones = torch.ones(B)
    expected = {name: weighted(rows, FACTORS if name.split(".")[0] in handle.layers else ones)[name] for name in got}
    assert_same(got, expected)
    assert any(name.startswith("2.parametrizations") for name in got)


def test_a_frozen_bias_stays_frozen() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(B, 3)
    model[0].bias.requires_grad_(False)
    with reweight(model, fixed):
        model(x).sin().sum().backward()
    assert model[0].bias.grad is None
    assert not model[0].bias.requires_grad
    model[0].bias.requires_grad_(True)
    assert_same({"0.weight": model[0].weight.grad}, {"0.weight": weighted(rows_of(model, x), FACTORS)["0.weight"]})


def test_the_model_may_be_a_layer_and_be_called_by_keyword() -> None:
    model, x = nn.Linear(3, 2), torch.randn(B, 3)
    with reweight(model, fixed):
        model(input=x).sin().sum().backward()
    assert_same(gradients(model), weighted(rows_of(model, x), FACTORS))


@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4), batch=st.integers(1, 6), data=st.data())
def test_property_mlp(sizes: list[int], batch: int, data: st.DataObject) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(sizes)))
    x, factors = torch.randn(batch, sizes[0]), torch.randn(batch)
    with reweight(model, lambda layer, grads: factors):
        model(x).sin().sum().backward()
    assert_same(gradients(model), weighted(rows_of(model, x), factors))
