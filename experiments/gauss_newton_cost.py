"""`python -m experiments.gauss_newton_cost`: what a Gauss–Newton step costs beside its parts alone, in processor time.

The 2-D Poisson problem of the experiments: B = 1020, P = 4417, with momentum and a line search.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import persample
from experiments.pinn_problems import PROBLEMS
from fngd import GaussNewton
from fngd.least_squares.residuals import read_residuals

WARMUP, REPEATS, DAMPING = 12, 9, 1e-9
"""The search tries more in the first steps."""


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def ratios() -> list[float]:
    """A step over (rows + Gram + solve), pair by pair."""
    problem = PROBLEMS["poisson2"](0, {"width": 64, "side": 30})
    params = list(problem.net.parameters())
    opt = GaussNewton(problem.net, damping=DAMPING, momentum=0.9)

    def parts() -> None:
        residuals = read_residuals(problem.residuals())
        rows = [
            torch.cat([g.flatten(1) for g in persample.grad(r, params, check=False)], 1)
            for r in residuals.groups.values()
        ]
        jacobian = torch.cat(rows)
        gram = jacobian @ jacobian.T
        gram.diagonal().add_(DAMPING)
        jacobian.T @ torch.cholesky_solve(residuals.scaled.detach().unsqueeze(1), torch.linalg.cholesky(gram))

    parts()
    for _ in range(WARMUP):
        opt.step(problem.residuals)
    return [seconds(lambda: opt.step(problem.residuals)) / seconds(parts) for _ in range(REPEATS)]


if __name__ == "__main__":
    found = ratios()
    middle = statistics.median(found)
    print(f"step over rows + Gram + solve: median {middle:.2f}, {min(found):.2f} to {max(found):.2f}")
