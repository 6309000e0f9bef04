"""What tests of `reweight` share: the gradients of single samples, and a policy of fixed factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from persample.reweighting import LayerGrads

B = 4

FACTORS = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)


def rows_of(model: nn.Module, samples: Tensor) -> dict[str, Tensor]:
    """Gradients of Σ sin(output) for each sample alone: name -> [B, *shape]."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for sample in samples:
        model.zero_grad()
        model(sample[None]).sin().sum().backward()
        for name, parameter in model.named_parameters():
            rows[name].append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
    model.zero_grad()
    return {name: torch.stack(entries) for name, entries in rows.items()}


def weighted(rows: dict[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    return {name: torch.tensordot(factors, row, 1) for name, row in rows.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def fixed(layer: str, grads: LayerGrads) -> Tensor:
    return FACTORS
