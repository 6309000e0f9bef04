"""Joint policies are asked once, with every layer that ran, when all of them are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from natural import data
from torch import Tensor, nn
from variants import Small

import persample
from fngd import NGD

pytestmark = pytest.mark.usefixtures("double")


def test_joint_policies_see_every_layer_once() -> None:
    model, (x, _) = Small(), data(4)
    asked: list[list[str]] = []

    def policy(grads: dict[str, persample.LayerGrads]) -> dict[str, Any]:
        asked.append(list(grads))
        return {"inner": torch.zeros(4), "head": tuple(2 * part if part is not None else None for part in plain)}

    model(x).sin().sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    plain = (before["head.weight"], None)
    model.zero_grad()
    with persample.reweight(model, policy, joint=True) as handle:
        model(x).sin().sum().backward()
        with pytest.raises(ValueError, match="no backward pass is asking"):
            handle.joined(lambda tensor, axis: tensor)
    assert asked == [["conv", "inner", "head"]]
    for name, p in model.named_parameters():
        factor = {"inner": 0.0, "head": 2.0}.get(name.split(".")[0], 1.0)
        torch.testing.assert_close(p.grad, factor * before[name])


def test_joint_gates_pass_over_layers_that_did_not_run() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(self.a(x)).detach() + self.a(x))

    model = Branches()
    opt = NGD(model, lr=0.1, gram="network")
    model(torch.randn(5, 3)).square().mean().backward()
    assert model.b.weight.grad is None
    assert model.a.weight.grad is not None
    opt.step()
    with torch.no_grad():
        model(torch.randn(5, 3))
