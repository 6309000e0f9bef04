"""Stored factors that are looked up at once for a whole step: the same as asked one by one, whatever the loop does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fngd import FNGD
from fngd.natural.sharing.table import CoefficientTable

pytestmark = pytest.mark.usefixtures("double")

STEPS, BATCH = 3, 5
EVENTS = ("left", "right", "both", "twice", "smaller", "step", "step", "skip", "epoch", "discard", "toggle", "freeze")


class Heads(nn.Module):
    """A trunk and two heads, so that a backward pass may reach some of the layers only."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, x: Tensor, which: str) -> Tensor:
        h = self.trunk(x).tanh()
        left, right = self.left(h).square().sum(1), self.right(h).sin().sum(1)
        return left if which == "left" else right if which == "right" else left + right


def gradients(events: list[str], options: dict[str, object]) -> list[Tensor | str]:
    """What a loop with these events leaves in `.grad` before every step; the messages of what is refused."""
    torch.manual_seed(0)
    model, seen = Heads(), []
    groups = [{"params": [*model.trunk.parameters(), *model.right.parameters()]}, {"params": model.left.parameters()}]
    opt = FNGD(model, groups, lr=0.1, alpha=1e-3, steps_per_epoch=STEPS, **options)

    def backward(which: str, batch: int = BATCH) -> None:
        try:
            model(torch.randn(batch, 3), which).mean().backward()
        except ValueError as error:
            seen.append(str(error))

    def step() -> None:
        seen.extend(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)
        opt.step()
        opt.zero_grad()

    def freeze() -> None:
        model.left.requires_grad_(not model.left.weight.requires_grad)

    def toggle() -> None:
        opt.param_groups[1]["precondition"] = not opt.param_groups[1]["precondition"]

    actions: dict[str, Callable[[], object]] = {
        "twice": lambda: (backward("left"), backward("both")), "smaller": lambda: backward("both", 2), "step": step,
        "skip": opt.zero_grad, "epoch": opt.start_epoch, "discard": model.zero_grad, "toggle": toggle, "freeze": freeze,
    }  # fmt: skip
    for event in [*["both", "step"] * STEPS, *events, "step"]:
        with contextlib.suppress(UserWarning):
            actions.get(event, lambda which=event: backward(which))()
    return seen


@settings(max_examples=30)
@given(
    events=st.lists(st.sampled_from(EVENTS), max_size=14),
    options=st.sampled_from(
        [{}, {"refresh_epochs": 2}, {"refresh_cosine": 0.9, "probe_layer": "trunk"}, {"control": "permuted"}]
    ),
)
@example(events=["left", "step"] * STEPS + ["both", "step"] * STEPS, options={"refresh_epochs": 2})
@example(events=["twice", "step"] * STEPS + ["both", "step"] * STEPS, options={})
@example(events=["toggle", "both", "step", "left", "epoch", "both"], options={})
@example(events=["both", "step", "left", "epoch", "both", "step"], options={})
@example(events=["both", "step"] * 2 * STEPS, options={"refresh_cosine": 1.0, "probe_layer": "trunk"})
def test_what_is_ready_is_what_would_be_asked(events: list[str], options: dict[str, object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CoefficientTable, "make_ready", lambda self, wanted: None)
        expected = gradients(events, options)
    found = gradients(events, options)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == other if isinstance(one, str) or isinstance(other, str) else torch.equal(one, other)


def test_most_layers_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[bool] = []
    ready = CoefficientTable.ready

    def counting(self: CoefficientTable, layer: str, batch: int) -> Tensor | None:
        factors = ready(self, layer, batch)
        served.append(factors is not None)
        return factors

    monkeypatch.setattr(CoefficientTable, "ready", counting)
    gradients(["both", "step"] * STEPS, {})
    assert sum(served) == 2 * STEPS  # all but the first of three layers
