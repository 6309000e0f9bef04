"""reweight: batches of all sizes, layouts and precisions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from passes import B, Mode, each_asking, every_mode, same, squares, step
from torch import Tensor, nn

from persample.reweighting import reweight

pytestmark = pytest.mark.usefixtures("double")


class Layouts(nn.Module):
    """In-place operations on outputs and on views of them, memory in other orders, a time-first part, 4 axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.more = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 2, stride=2, dilation=2, groups=2)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2, output_padding=1)
        self.four, self.time = nn.Linear(3, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.contiguous(memory_format=torch.channels_last))
        h[:, 0].mul_(2)
        h = self.more(h.relu_()[:, :, 1:].contiguous(memory_format=torch.channels_last))
        h[:, ::3].zero_()
        h = self.four(self.up(h).permute(0, 2, 3, 1))
        return self.time(h.transpose(0, 1).flatten(2).unflatten(2, (-1, 5)).tanh_()).transpose(0, 1)


@every_mode
@pytest.mark.parametrize("expanded", [False, True])
def test_layouts(expanded: bool, mode: Mode) -> None:
    model, x = Layouts(), torch.randn(B, 2, 7, 7)

    def losses() -> Tensor:
        output = model(x)
        return output.flatten(1).sum(1) if expanded else squares(output)

    expected = mode.expected(model, losses())
    with mode.on(model):
        for _ in range(2):
            same(step(model, losses), expected)


@each_asking
@pytest.mark.parametrize("size", [0, 1])
def test_batches_of_none_and_of_one(size: int, mode: Mode) -> None:
    model, c = nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(9, 2)), torch.ones(size)
    x = torch.randn(size, 2, 4)
    policy: Any = (lambda grads: dict.fromkeys(grads, 3 * c)) if mode.joint else (lambda layer, grads: 3 * c)
    plain = step(model, lambda: squares(model(x)))
    with reweight(model, policy, joint=mode.joint):
        same(step(model, lambda: squares(model(x))), {name: 3 * grad for name, grad in plain.items()})


@every_mode
def test_a_layer_on_positions_time_first_and_on_samples_alone(mode: Mode) -> None:
    """Axis 1 of [T, B, D] counts samples, of [B, D] axis 0, and the last axis never, whatever its size."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(B, B)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x.transpose(0, 1)).tanh()[-1])

    model, x = Model(), torch.randn(B, 3, B)
    expected = mode.expected(model, squares(model(x)))
    with mode.on(model):
        for _ in range(2):
            same(step(model, lambda: squares(model(x))), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_known_factors_are_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype), torch.randn(B, 3, dtype=dtype)
    c = torch.tensor([1.001, -1.001, 1.003, -0.9987], dtype=torch.float32)
    seen: dict[str, list[Tensor]] = {"policy": [], "known": []}
    for way, options in (("policy", {}), ("known", {"known": lambda layer, batch, device: c})):
        with reweight(model, lambda layer, grads: c, **options):
            model.zero_grad()
            model(x).float().sin().sum().backward()
        seen[way] = [parameter.grad.clone() for parameter in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(seen["policy"], seen["known"], strict=True))
