"""What the tests of NGD and FNGD's options share: a small model, and its samples' gradients one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS = ("conv", "inner", "head")
TOLERANCE = 1e-8


class Small(nn.Module):
    """A convolution, a linear layer with positions, one without a bias, and a normalisation."""

    activation = staticmethod(torch.tanh)  # not ReLU: no layer may be without a gradient

    def __init__(self, channels: int = 2, width: int = 3, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, stride=2)
        self.inner = nn.Linear(width, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.conv(x)).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.inner(x)).tanh().mean(1))


def data(size: int, channels: int = 2, classes: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(size, channels, 5, 5), torch.randint(classes, (size,))


def clean(model: Small) -> Small:
    """A copy without hooks."""
    copy = type(model)(model.conv.in_channels, model.conv.out_channels, model.head.out_features)
    copy.load_state_dict(model.state_dict())
    return copy


def rows(model: Small, x: Tensor, losses: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Each sample's own gradients, name -> [B, *shape]; `losses` gives one loss per sample of the outputs."""
    copy = clean(model)
    values = losses(copy(x))
    grads = [torch.autograd.grad(value, list(copy.parameters()), retain_graph=True) for value in values]
    names = [name for name, _ in copy.named_parameters()]
    return dict(zip(names, map(torch.stack, zip(*grads, strict=True)), strict=True))


def cross_entropies(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda outputs: F.cross_entropy(outputs, y, reduction="none")


def matrix(own: dict[str, Tensor], *layers: str) -> Tensor:
    """U [N, B] of one layer or several."""
    return torch.cat([row.flatten(1) for name, row in own.items() if name.split(".")[0] in layers], 1).T


def vector(grads: dict[str, Tensor], *layers: str) -> Tensor:
    return torch.cat([grad.flatten() for name, grad in grads.items() if name.split(".")[0] in layers])


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dense(u: Tensor, g: Tensor, *, lam: float | Tensor, scale: str = "absorb") -> Tensor:
    """(λI + UUᵀ/B)⁻¹ g from the N × N matrix; times λ with "absorb", of the length of g with "graft"."""
    d = torch.linalg.solve(lam * torch.eye(len(u)) + u @ u.T / u.shape[1], g)
    if scale == "graft":
        return d * g.norm() / d.norm()
    return d * lam if scale == "absorb" else d


def blocks(gram: str) -> list[tuple[str, ...]]:
    """The layers that share a matrix."""
    return [LAYERS] if gram == "network" else [(layer,) for layer in LAYERS]


def close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    error = ((got - expected).norm() / expected.norm()).item()
    assert error <= tolerance, f"relative deviation {error:.1e}"
