"""What a Gauss–Newton step costs beside its parts timed alone, and what memory chunks of rows leave."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import persample
from experiments.pinn_problems import PROBLEMS
from fngd import GaussNewton
from fngd.residuals import read_residuals

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def test_a_step_costs_at_most_half_more_than_its_parts() -> None:
    """The 2-D Poisson problem of the experiments: B = 1020, P = 4417, with momentum and a search."""
    problem = PROBLEMS["poisson2"](0, {"width": 64, "side": 30})
    params = list(problem.net.parameters())
    opt = GaussNewton(problem.net, damping=1e-9, momentum=0.9)

    def parts() -> None:
        residuals = read_residuals(problem.residuals())
        rows = [
            torch.cat([g.flatten(1) for g in persample.grad(r, params, check=False)], 1)
            for r in residuals.groups.values()
        ]
        jacobian = torch.cat(rows)
        gram = jacobian @ jacobian.T
        gram.diagonal().add_(1e-9)
        jacobian.T @ torch.cholesky_solve(residuals.scaled.detach().unsqueeze(1), torch.linalg.cholesky(gram))

    parts()
    for _ in range(12):  # past the first steps, in which the search tries more
        opt.step(problem.residuals)
    ratios = [seconds(lambda: opt.step(problem.residuals)) / seconds(parts) for _ in range(9)]
    print(
        f"step over rows + Gram + solve: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
    )
    assert statistics.median(ratios) <= 1.5


SCRIPT = """
import resource, sys, torch
from torch import nn
from fngd import GaussNewton

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 1)).double()
x = torch.rand(1500, 4).double()
warm = x[:2]
GaussNewton(net, damping=1e-3).direction(lambda: net(warm).squeeze(1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
options = {"gram": "rows", "chunk_size": int(sys.argv[1]) or None}
GaussNewton(net, damping=1e-3, **options).direction(lambda: net(x).squeeze(1) - 1)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(p.numel() for p in net.parameters()), (peak - before) * 1024)
"""


def test_chunks_bound_the_memory() -> None:
    """Documented: three chunks of J, the matrices of the solve, and the graph."""
    peaks = {}
    for chunk in (0, 100):
        ran = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(chunk)], capture_output=True, text=True, check=True, cwd=ROOT
        )
        size, peaks[chunk] = map(int, ran.stdout.split())
    batch, chunk = 1500, 100
    whole, matrices = batch * size * 8, 4 * batch**2 * 8
    activations = 40 * batch * 200 * 8  # of both passes, and factors
    print(
        f"J {whole / 2**20:.0f} MiB; peak {peaks[0] / 2**20:.0f} whole, {peaks[100] / 2**20:.0f} in chunks of {chunk}"
    )
    assert peaks[0] > whole
    assert peaks[100] <= 3 * chunk * size * 8 + matrices + activations < whole
