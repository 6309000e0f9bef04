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

ROOT = Path(__file__).parents[2]
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
chunked = persample.per_sample(model, loss_fn, x, y, chunk_size=2)


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x):
        return self.lin(x - x.mean(0))




def told(code):
    try:
        eval(code)
    except (TypeError, ValueError, persample.PerSampleError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


"""
MISTAKES = {
    "persample.per_sample(model, 'ce', x, y)": ("TypeError", "loss_fn must be a function", "got 'ce'", "reduction="),
    "persample.per_sample(lambda x: x, loss_fn, x, y)": (
        "TypeError",
        "got function",
        "persample.from_losses(losses, params)",
    ),
    "persample.per_sample(model, nn.CrossEntropyLoss, x, y)": ("TypeError", "loss_fn must be a function", "criterion"),
    "persample.per_sample(model, loss_fn, x.numpy(), y)": ("TypeError", "the model does not take inputs", "from_numpy"),
    "persample.per_sample(model, loss_fn, (x.numpy(),), y, chunk_size=2)": ("TypeError", "got a numpy.ndarray"),
    "persample.per_sample(model, loss_fn, None, y)": ("TypeError", "got None. Give what a call takes: a tensor"),
    "persample.per_sample(model, loss_fn, x.tolist(), y)": ("TypeError", "got a list of numbers", "torch.tensor("),
    "persample.per_sample(model, loss_fn, [x], y, backend='hooks').dot({'0.bias': 1.0})": ("TypeError", "got float"),
    "persample.per_sample(model, loss_fn, torch.utils.data.DataLoader(x), y)": ("got a DataLoader", "of one batch"),
    "persample.per_sample(model, loss_fn, x, y.numpy())": ("TypeError", "loss_fn does not take targets", "from_numpy"),
    "persample.per_sample(model, loss_fn, x, chunk_size=2)": ("TypeError", "does not take targets", "got None"),
    "persample.per_sample(model, loss_fn, x, y.tolist(), backend='vmap')": ("TypeError", "got a list of numbers"),
    "persample.jacobian(torch.sin, x)": ("TypeError", "got builtin_function_or_method", "persample.from_losses"),
    "persample.jacobian(model, x, params='0.weight')": ("TypeError", "got str", "For one, [params]"),
    "persample.jacobian(model, x, output_fn=lambda out: out.tolist())": ("TypeError", "got list", "output_fn="),
    "persample.jacobian(model, x).gram(other=psg)": ("TypeError", "persample.jacobian", "got PerSampleGrads"),
    "persample.jacobian(model, x).ggn(None)": ("ValueError", "[B, *out, *out] = (6, 3, 3)", "got NoneType"),
    "persample.jacobian(model, x).weighted_sum([1.0])": ("ValueError", "(6, 3)", "got list"),
    "psg.gram(centred=True, other=psg)": ("ValueError", "other= holds another batch"),
    "psg.norms(per='token')": ("ValueError", "of norms and gram also 'position'", "got 'token'"),
    "persample.per_sample(model, lambda o, t: None, x, y)": ("TypeError", "got NoneType", "'return losses'"),
    "persample.per_sample(model, lambda o, t: (loss_fn(o, t), o), x, y)": ("TypeError", "got tuple", "losses alone"),
    "persample.per_sample(model, lambda o, t: o.detach().numpy(), x, y)": ("got ndarray", "operations of torch"),
    "persample.per_sample(model, lambda o, t: o, x, y)": ("ValueError", "got (6, 3)", "grad(losses.flatten(), params)"),
    "persample.per_sample(model, lambda o, t: o.flatten(), x, y, chunk_size=2)": (
        "There are 18 losses for 6 samples, by dimension 0 of the inputs: 3 for each",
        "persample.grad(losses, params)",
        "losses.view(6, -1).sum(1)",
    ),
    "persample.per_sample(Centred(), loss_fn, x, y, chunk_size=2)": (
        "leave chunk_size out: hold='graph' saves memory",
    ),
    "persample.per_sample(model, loss_fn, x, y, chunk_size=2, coupled='rows')": ("ValueError", "hold='graph'"),
    "persample.grad(loss_fn(model(x), y), None)": ("TypeError", "params must be tensors", "got NoneType"),
    "persample.from_losses(loss_fn(model(x), y), None)": ("TypeError", "params must be tensors", "got NoneType"),
    "persample.grad(loss_fn(model(x), y), [])": ("ValueError", "params holds no tensor", "A generator that was used"),
    "persample.grad(loss_fn(model(x), y), nn.Linear(4, 8).parameters())": ("Did you wrap or copy the model",),
    "psg.project(16)": ("TypeError", "one of persample.projections (Kronecker", "such as Kronecker(16, 16); got 16"),
    "persample.projections.Rademacher(2.5)": ("ValueError", "k must be a positive number of features; got 2.5"),
    "psg.gram(other=torch.eye(6))": ("ValueError", "what per_sample returned for another batch; got Tensor"),
    "chunked.gram(other=[1])": ("ValueError", "what per_sample returned for another batch; got list"),
    "chunked.weighted_sum(None)": ("ValueError", "c must be a tensor of shape [B] = [6]", "got NoneType"),
    "chunked.grads(out=3)": ("TypeError", "out must be a dict", "got int"),
    "chunked.grads(out={'0.bias': torch.ones(2, 8)})": ("ValueError", "a tensor with B = 6 rows; got (2, 8)"),
    "psg.grads(out={'0.bias': None})": ("TypeError", "out['0.bias'] must be a tensor; got NoneType"),
    "psg.clipped_sum(torch.ones(6))": ("ValueError", "max_norm must be positive; got tensor"),
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
