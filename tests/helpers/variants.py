"""What the tests of NGD's variants share: a small model with ReLU, its samples one by one, and dense directions."""

from __future__ import annotations

import natural
import torch
from natural import clean
from torch import Tensor, nn
from torch.nn import functional as F


class Small(natural.Small):
    """The same with ReLU in place."""

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        return F.relu(x, inplace=True)


def rows(model: Small, batch: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Each sample's own gradients, name -> [B, *shape], and s_b = ‖∂ℓ_b/∂logits‖²; from a clean copy."""
    copy, grads, squares = clean(model), [], []
    for x, y in zip(*batch, strict=True):
        logits = copy(x[None])
        loss = F.cross_entropy(logits, y[None])
        squares.append(torch.autograd.grad(loss, logits, retain_graph=True)[0].square().sum())
        grads.append(torch.autograd.grad(loss, list(copy.parameters())))
    names = [name for name, _ in copy.named_parameters()]
    return dict(zip(names, map(torch.stack, zip(*grads, strict=True)), strict=True)), torch.stack(squares)


def dense(u: Tensor, alpha: float, s: Tensor | None = None, scale: str = "absorb") -> Tensor:
    """(λI + UUᵀ/B)⁻¹ U s/B from the N × N matrix; times λ with "absorb", of the length of g with "graft"."""
    batch = u.shape[1]
    lam = alpha * (u.T @ u).norm()
    s = torch.ones(batch) if s is None else s
    d = torch.linalg.solve(lam * torch.eye(len(u)) + u @ u.T / batch, u @ s / batch)
    if scale == "graft":
        return d * u.mean(1).norm() / d.norm()
    return d * lam if scale == "absorb" else d


def backward(
    model: nn.Module, batch: tuple[Tensor, Tensor], *, factor: float = 1.0, reduction: str = "mean"
) -> dict[str, Tensor]:
    model.zero_grad()
    (factor * F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}
