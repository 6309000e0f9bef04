"""Convolution modules whose geometry or weight was given another value after they were made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import loop_grads_of
from passes import FACTORS, B, Mode, each_asking, same, squares, step
from torch import nn
from torch.nn import functional as F

import persample
from persample.blocks.convolution.build import padding

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),  # torch's, of its speed
]

CHANGES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "same, dilation": (lambda: nn.Conv2d(2, 3, (3, 2), padding="same"), {"dilation": (2, 1)}),
    "same, odd": (lambda: nn.Conv1d(2, 3, 2, padding="same"), {"dilation": (3,)}),
    "same, weight": (lambda: nn.Conv2d(2, 3, 3, padding="same"), {"weight": (3, 2, 5, 2)}),
    "same instead of valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid", dilation=2), {"padding": "same"}),
    "valid instead of same": (lambda: nn.Conv2d(2, 3, 3, padding="same"), {"padding": "valid"}),
    "numbers": (lambda: nn.Conv2d(2, 3, 3), {"padding": 1, "stride": 2, "dilation": 2}),
    "lists": (lambda: nn.Conv2d(2, 3, 3), {"padding": [1, 0], "stride": [2], "dilation": [1, 2]}),
    "same, numbers": (lambda: nn.Conv2d(2, 3, (3, 2), padding="same"), {"stride": 1, "dilation": 3}),
    "circular, numbers": (lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="circular"), {"stride": 2, "dilation": 2}),
    "groups": (lambda: nn.Conv1d(2, 4, 3), {"groups": 2, "weight": (4, 1, 5), "padding": 3}),
    "transposed": (
        lambda: nn.ConvTranspose2d(2, 3, 3), {"stride": 2, "padding": (1, 0), "output_padding": 1, "dilation": 2},
    ),
    "transposed, weight": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), {"weight": (2, 3, 4), "padding": (1,)}),
}  # fmt: skip


def changed(name: str) -> nn.Module:
    build, changes = CHANGES[name]
    module = build()
    for attribute, value in changes.items():
        setattr(module, attribute, nn.Parameter(torch.randn(value)) if attribute == "weight" else value)
    return module


def images(module: nn.Module) -> torch.Tensor:
    return torch.randn(B, 2, *(8, 7)[: module.weight.dim() - 2])


@each_asking
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_reweighted_as_the_forward_runs_it(mode: Mode, name: str, bias: bool) -> None:
    model = nn.Sequential(changed(name), nn.Tanh())
    if not bias:
        model[0].bias = None
    x = images(model[0])
    expected = mode.expected(model, squares(model(x)))
    with mode.on(model):
        for _ in range(2):
            same(step(model, lambda: squares(model(x))), expected)


@pytest.mark.parametrize("name", CHANGES)
def test_per_sample_gradients_of_hooks(name: str) -> None:
    model = changed(name)
    x = images(model)
    rows = loop_grads_of(squares(model(x)), dict(model.named_parameters()))
    psg = persample.per_sample(model, lambda y, _: squares(y), x, backend="hooks")
    for path, row in psg.grads().items():
        torch.testing.assert_close(row, rows[path])
    total = psg.weighted_sum(FACTORS)
    same(total, {path: torch.tensordot(FACTORS, row, 1) for path, row in rows.items()})


def test_a_change_between_two_steps() -> None:
    model, mode = nn.Sequential(nn.Conv1d(2, 3, 3, padding="same", bias=False)), Mode(joint=False, gram=False)
    x = images(model[0])
    with mode.on(model):
        step(model, lambda: squares(model(x)))
    model[0].dilation = (2,)
    expected = mode.expected(model, squares(model(x)))
    with mode.on(model):
        model[0].dilation = (1,)
        step(model, lambda: squares(model(x)))
        model[0].dilation = (2,)
        same(step(model, lambda: squares(model(x))), expected)


@given(st.data())
def test_padding_is_what_the_function_adds(data: st.DataObject) -> None:
    """`padding` against the size and the values of what F.conv gives; None only where no equal ends would do."""
    number = st.integers(1, 4)
    axes = data.draw(st.integers(1, 3), "axes")
    kernel, dilation = (data.draw(st.tuples(*[number] * axes), what) for what in ("kernel", "dilation"))
    kind = [nn.Conv1d, nn.Conv2d, nn.Conv3d][axes - 1]
    module = kind(1, 1, kernel, padding="same", bias=False)
    module.dilation = data.draw(st.sampled_from([dilation, dilation[0]]), "as given")
    # Each entry of the output tells which entries it was made of.
    x = torch.arange(1.0, 14.0**axes + 1).view(1, 1, *[14] * axes)[(slice(None),) * 2 + (slice(13),) * axes]
    found = padding(module)
    function = [F.conv1d, F.conv2d, F.conv3d][axes - 1]
    whole = (module.dilation,) * axes if isinstance(module.dilation, int) else module.dilation
    if found is None:
        assert any((k - 1) * d % 2 for k, d in zip(kernel, whole, strict=True))
    else:
        torch.testing.assert_close(module(x), function(x, module.weight, None, 1, found, module.dilation))
