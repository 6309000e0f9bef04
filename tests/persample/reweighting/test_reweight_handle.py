"""What the handle of `persample.reweight` tells: where layers' weights are, and what the policy answered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample


def _plain(layer: str, grads: persample.LayerGrads) -> None:
    return None


def test_parts_of_modules_are_whole_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.Conv1d(4, 2, 1, bias=False), nn.Linear(3, 4))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    handle = persample.reweight(model, _plain)
    weight, bias = handle.parts("0")
    assert weight is not None
    assert weight.param is model[0].weight
    assert weight.whole
    assert bias is not None
    assert bias.param is model[0].bias
    assert bias.whole
    assert handle.parts("1")[1] is None
    assert handle.parts("2") == handle.parts("0")  # one layer with it
    assert handle.functions == ()
    with pytest.raises(KeyError, match=r"no layer is called '3'; there are \['0', '1', '2'\]"):
        handle.parts("3")


def test_parts_of_functions_are_rows():
    model = nn.MultiheadAttention(4, 2, kdim=4, vdim=4)
    handle = persample.reweight(model, _plain, functions=True)
    x, memory = torch.randn(3, 2, 4), torch.randn(5, 2, 4)
    model(x, memory, memory)
    rows = {name: handle.parts(name) for name in handle.functions}
    assert sorted(rows) == ["in_proj_weight[0:4]", "in_proj_weight[4:12]", "out_proj"]
    weight, bias = rows["in_proj_weight[4:12]"]
    assert weight is not None
    assert bias is not None
    assert (weight.param is model.in_proj_weight, weight.start, weight.stop, weight.whole) == (True, 4, 12, False)
    assert torch.equal(bias.of(model.in_proj_bias), model.in_proj_bias[4:])
    assert rows["out_proj"][0] is not None
    assert rows["out_proj"][0].whole


def test_a_function_with_a_computed_bias_has_no_parts():
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3))
            self.shift = nn.Parameter(torch.randn(2))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight, 2 * self.shift)

    model = Computed()
    handle = persample.reweight(model, _plain, functions=True)
    model(torch.randn(4, 3)).sum().backward()
    assert handle.parts("weight") == (None, None)


@pytest.mark.parametrize("joint", [False, True])
def test_a_wrapped_policy_gives_every_answer(joint: bool):
    model, seen = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), []

    def doubled(*asked: Any) -> Any:
        if joint:
            return {path: torch.full((each.batch_size,), 2.0) for path, each in asked[0].items()}
        return torch.full((asked[1].batch_size,), 2.0)

    def noting(policy: Any) -> Any:
        def noted(*asked: Any) -> Any:
            answer = policy(*asked)
            seen.append(answer)
            return answer

        return noted

    handle = persample.reweight(model, doubled, joint=joint)
    with handle.wrapped(noting):
        model(torch.randn(5, 3)).sum().backward()
    assert len(seen) == (1 if joint else 2)
    assert model[1].bias.grad.item() == pytest.approx(10)
    model(torch.randn(5, 3)).sum().backward()
    assert len(seen) == (1 if joint else 2)


def test_known_factors_pass_a_wrapped_policy_too():
    model, asked = nn.Linear(3, 1), []
    handle = persample.reweight(
        model,
        lambda layer, grads: torch.full((grads.batch_size,), 2.0),
        known=lambda layer, batch, device: torch.full((batch,), 3.0),
    )

    def noting(policy: Any) -> Any:
        return lambda layer, grads: asked.append(layer) or policy(layer, grads)

    def gradient() -> float:
        model.zero_grad()
        model(torch.ones(5, 3)).sum().backward()
        assert model.bias.grad is not None
        return model.bias.grad.item()

    assert gradient() == 15
    assert asked == []
    with pytest.raises(RuntimeError, match="ended"), handle.wrapped(noting), handle.wrapped(noting):
        assert gradient() == 10
        assert asked == ["", ""]
        raise RuntimeError("ended")
    assert gradient() == 15
