"""Other ways to run a model with attention: evaluated, in a checkpoint, compiled."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attending import problem, step
from preconditioned import close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fngd import FNGD, KFAC

pytestmark = pytest.mark.usefixtures("double")


def test_a_whole_transformer_and_its_evaluation() -> None:
    """Evaluation takes torch's fast path as before; coefficients are computed once and shared."""
    torch.manual_seed(0)
    model = nn.Transformer(4, 2, 1, 1, 6, dropout=0.0, batch_first=True)
    x, y = torch.randn(3, 4, 4), torch.randn(3, 5, 4)
    opt = FNGD(model, lr=0.1, steps_per_epoch=1)
    for _ in range(3):
        opt.zero_grad()
        model(x, y).sin().square().mean().backward()
        opt.step()
    paths = {path for path, why in opt.explain().items() if why.startswith("reweighted")}
    assert len(paths) == 6 + 4 + 1  # two and a half attentions in two or three layers, four linear layers
    assert {key[0] for key in opt._table._rows} == paths
    model.eval()
    with torch.no_grad():
        got = model(x, y)
    opt.remove()
    with torch.no_grad():
        torch.testing.assert_close(got, model(x, y))


@pytest.mark.parametrize("build", [FNGD, KFAC])
def test_attention_in_a_checkpoint(build: Any) -> None:
    """What a checkpoint runs again in the backward pass is preconditioned as what runs once."""

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module, used: bool) -> None:
            super().__init__()
            self.inner, self.used = inner, used

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False) if self.used else self.inner(x)

    inner, x = problem("three")
    models = [Checkpointed(copy.deepcopy(inner), used) for used in (False, True)]
    more = {"steps_per_epoch": 1} if build is FNGD else {"inverse_every": 2}
    for model in models:
        opt = build(model, lr=0.1, **more)
        for _ in range(3):
            step(model, opt, x)
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        close(second.detach(), first.detach(), 1e-12)


@pytest.mark.filterwarnings("ignore")  # Dynamo warns about the shape checks that only tests install
@pytest.mark.parametrize("build", [FNGD, pytest.param(KFAC, marks=pytest.mark.slow)])
def test_attention_under_torch_compile(build: Any) -> None:
    """It stays out of the graph, and is preconditioned as ever; without functions one graph is possible."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    first, x = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), torch.randn(5, 3, 4)
    second = copy.deepcopy(first)
    more = {"steps_per_epoch": 1} if build is FNGD else {}
    opts = [build(model, lr=0.1, **more) for model in (first, second)]
    for _ in range(3):
        for model, opt in zip((first, torch.compile(second, backend="eager")), opts, strict=True):
            opt.zero_grad()
            model(x).sin().sum().backward()
            opt.step()
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        close(two.detach(), one.detach(), 1e-10)
    assert "plain" not in opts[1].explain()["self_attn.in_proj_weight"]
    torch._dynamo.reset()


ONE_GRAPH = """
import warnings, torch, fngd
from torch import nn
warnings.simplefilter("ignore")
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.places = nn.Linear(3, 4), nn.Parameter(torch.randn(5, 4))  # as many models have for positions
    def forward(self, x):
        return (self.inp(x) + self.places).tanh().sum(1)
for functions in (False, True):
    torch._dynamo.reset()
    model = nn.Sequential(Model())
    opt = fngd.NGD(model, lr=0.1, functions=functions)
    print(functions, torch._dynamo.explain(model)(torch.randn(6, 5, 3)).graph_break_count > 0)
"""


@pytest.mark.slow
def test_without_functions_a_model_with_a_matrix_is_one_graph() -> None:
    """In a process of its own: Dynamo cannot trace the shape checks of the tests."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])}
    done = subprocess.run([sys.executable, "-c", ONE_GRAPH], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False", "True", "True"]
