"""What the tests of Gauss–Newton share: a small problem with derivatives, its J row by row, and dense directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS = {"boundary": 7.0}
DAMPING = 1e-3


def network(inputs: int = 2, width: int = 5, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    ).double()


def by_autograd(net: nn.Module, points: Tensor) -> Tensor:
    points = points.clone().requires_grad_()
    value = net(points)
    (slope,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    second = [torch.autograd.grad(s.sum(), points, create_graph=True)[0][:, i] for i, s in enumerate(slope.T)]
    return sum(second, value.squeeze(1) ** 2)


def problem(laplacian: Callable = by_autograd, interior: int = 6, boundary: int = 3, seed: int = 0) -> tuple[Any, Any]:
    net = network(seed=seed)
    inside, edge = torch.rand(interior, 2).double(), torch.rand(boundary, 2).double()

    def closure() -> dict[str, Tensor]:
        return {"interior": laplacian(net, inside) + 1, "boundary": net(edge).squeeze(1)}

    return net, closure


def dense_rows(net: nn.Module, closure: Callable[[], dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """J and s, one backward pass for each row."""
    groups = closure()
    scaled = torch.cat([math.sqrt(WEIGHTS.get(name, 1.0) / len(r)) * r for name, r in groups.items()])
    rows = []
    for value in scaled:
        grads = torch.autograd.grad(value, list(net.parameters()), retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows), scaled.detach()


def dense_direction(rows: Tensor, s: Tensor, previous: Tensor | None = None, momentum: float = 0.0) -> Tensor:
    """argmin ‖J d − s‖² + λ‖d − μφ‖², as one tall least-squares problem: neither J Jᵀ nor JᵀJ."""
    start = momentum * previous if previous is not None else torch.zeros(rows.shape[1]).double()
    tall = torch.cat([rows, math.sqrt(DAMPING) * torch.eye(rows.shape[1]).double()])
    return torch.linalg.lstsq(tall, torch.cat([s, math.sqrt(DAMPING) * start])).solution


def flat(parts: tuple[Tensor, ...] | Any) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])


def close(actual: Tensor, expected: Tensor) -> None:
    assert torch.linalg.vector_norm(actual - expected) <= 1e-8 * torch.linalg.vector_norm(expected)
