"""What the public names say to arguments of a wrong kind: what was received, what is allowed, what to do.

In a process without the type checks of the tests (jaxtyping, beartype), which would answer in place of the library.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUP = """
import json

import torch
from torch import nn

import fngd
import persample


def loss_fn(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


x, y = torch.randn(6, 4), torch.randint(3, (6,))
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
psg = persample.per_sample(model, loss_fn, x, y)


def told(code):
    try:
        eval(code)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


"""
MISTAKES = {
    "persample.per_sample(model, 'ce', x, y)": ("TypeError", "loss_fn must be a function", "got 'ce'", "reduction="),
    "persample.per_sample(lambda x: x, loss_fn, x, y)": ("TypeError", "got function", "persample.grad(losses, params)"),
    "persample.grad(loss_fn(model(x), y), model.named_parameters())": ("got tuple", "give model.parameters()"),
    "psg.dot([1])": ("TypeError", "vectors must be a dict, parameter name -> tensor; got list"),
    "psg.grads(out=[1])": ("TypeError", "out must be a dict, parameter name -> buffer", "got list"),
    "psg.clipped_sum('1')": ("ValueError", "max_norm must be positive; got '1'", "a dict layer -> number"),
    "persample.reweight(model.parameters(), print)": ("TypeError", "got generator. Give the model itself"),
    "persample.reweight(model, 3)": ("TypeError", "policy must be a function (layer, grads) -> c", "got int"),
    "persample.reweight(model, print, batch_axis='x')": ("ValueError", "batch_axis='x'", "a persample.Folded"),
    "persample.Folded('a')": ("ValueError", "Folded(before='a'", "1 or more, or None"),
    "fngd.FNGD(model.parameters(), lr=0.1, steps_per_epoch=1)": ("TypeError", "FNGD(model, lr=...)", "got generator"),
    "fngd.KFAC(model.parameters(), lr=0.1)": ("TypeError", "KFAC(model, lr=...)", "got generator", "params="),
    "fngd.Shampoo(model, lr=0.1)": ("TypeError", "give model.parameters(); got Sequential"),
    "fngd.NGD(model, lr='0.1')": ("ValueError", "lr='0.1'; it must be at least 0"),
    "fngd.NGD(model, lr=0.1, alpha='big')": ("ValueError", "alpha='big'; it must be > 0"),
    "fngd.NGD(model, lr=0.1, damping=1e-3)": ("ValueError", "give exactly one", "with damping=, alpha=None"),
    "fngd.GaussNewton(model, weights=3)": ("TypeError", "weights must be a dict", "got 3"),
    "fngd.smw_coefficients([[1.0]], alpha=0.1)": ("TypeError", "gram must be a tensor", "got list"),
    "fngd.smw_coefficients(torch.eye(2).long(), alpha=0.1)": ("TypeError", "floating-point", "got torch.int64"),
}
for built in ("NGD(nn.Linear(3, 1))", "KFAC(nn.Linear(3, 1))", "Shampoo(model.parameters())", "GaussNewton(model)"):
    for rubbish in ("None", "'x'", "[]"):
        words = ("ValueError", f"the state is {rubbish}; it must be a dict", "nothing has been loaded")
        MISTAKES[f"fngd.{built}.load_state_dict({rubbish})"] = words


@pytest.fixture(scope="module")
def sentences() -> dict[str, str]:
    code = f"{SETUP}print(json.dumps({{code: told(code) for code in {list(MISTAKES)!r}}}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("code", MISTAKES)
def test_a_mistake_is_told(code: str, sentences: dict[str, str]) -> None:
    for words in MISTAKES[code]:
        assert words in sentences[code]
