"""A loop of Hugging Face Accelerate is the same as a plain one, whatever it accumulates, clips, schedules or saves.

Accelerate and Lightning come with the frameworks extra, which no other test needs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import METHODS, build_model, data, loader, plain_run, same_parameters
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"),
    pytest.mark.filterwarnings("ignore"),  # its advice on its own options
]
EPOCHS = 2
NAMES = ("fngd", "ngd", "kfac", "skfac", "eva", "shampoo")


def prepared(accumulate: int, precision: str, model: nn.Module, opt: Any) -> tuple[Any, list[Any]]:
    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
    return accelerator, [*accelerator.prepare(model, opt, loader(), CosineAnnealingLR(opt, EPOCHS * len(loader())))]


def epoch(accelerator: Any, parts: list[Any]) -> None:
    model, opt, batches, schedule = parts
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            schedule.step()
            opt.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_accelerate_runs_as_a_plain_loop_does(name: str, accumulate: int) -> None:
    model = build_model()
    accelerator, parts = prepared(accumulate, "no", model, METHODS[name](model))
    for _ in range(EPOCHS):
        epoch(accelerator, parts)
    assert same_parameters(model, plain_run(name, EPOCHS, accumulate, clip=0.5))


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_resumes(name: str, tmp_path: Path) -> None:
    whole, first, second = (build_model() for _ in range(3))
    accelerator, parts = prepared(1, "no", whole, METHODS[name](whole))
    for _ in range(EPOCHS):
        epoch(accelerator, parts)
    accelerator, parts = prepared(1, "no", first, METHODS[name](first))
    epoch(accelerator, parts)
    accelerator.save_state(str(tmp_path))
    accelerator, parts = prepared(1, "no", second, METHODS[name](second))
    accelerator.load_state(str(tmp_path))
    epoch(accelerator, parts)
    assert same_parameters(whole, second)


def test_accelerate_in_bfloat16_stays_near_float32() -> None:
    losses = {}
    for precision in ("no", "bf16"):
        model = build_model()
        accelerator, parts = prepared(1, precision, model, METHODS["fngd"](model))
        for _ in range(EPOCHS):
            epoch(accelerator, parts)
        x, y = data()
        losses[precision] = F.cross_entropy(model.eval()(x), y).item()
    assert losses["no"] != losses["bf16"]
    assert torch.tensor(losses["bf16"]).isclose(torch.tensor(losses["no"]), rtol=0.05)
