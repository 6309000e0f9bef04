"""What the tests of NGD's and FNGD's loops share: U c in the layers of `Net`, from the gradients of single samples."""

from __future__ import annotations

import torch
from natural import LAYERS, matrix
from preconditioned import Net
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


def data(*sizes: int) -> list[Batch]:
    return [(torch.randn(size, 2, 4, 3), torch.randint(3, (size,))) for size in sizes]


def run(model: nn.Module, opt: torch.optim.Optimizer, batch: Batch, reduction: str = "mean") -> dict[str, Tensor]:
    """One turn of the loop; the gradients that the step saw."""
    opt.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1], reduction=reduction).backward()
    seen = {name: p.grad.clone() for name, p in model.named_parameters()}
    opt.step()
    return seen


def own_gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The gradient of each sample's own loss: name -> [B, *shape]."""
    clean = Net()
    clean.load_state_dict(model.state_dict())
    rows = []
    for x, y in zip(*batch, strict=True):
        loss = F.cross_entropy(clean(x[None]), y[None])
        rows.append(torch.autograd.grad(loss, list(clean.parameters())))
    return {
        name: torch.stack(row) for (name, _), row in zip(clean.named_parameters(), zip(*rows, strict=True), strict=True)
    }


def directions(rows: dict[str, Tensor], coefficients: dict[str, Tensor], reduction: str = "mean") -> dict[str, Tensor]:
    """U c in the layers, the plain gradient elsewhere (for a sum, both times B)."""
    batch = len(next(iter(rows.values())))
    mean = torch.full((batch,), 1 / batch)
    scale = 1 if reduction == "mean" else batch
    return {
        name: scale * torch.tensordot(coefficients.get(name.split(".")[0], mean), row, 1) for name, row in rows.items()
    }


def explicit(rows: dict[str, Tensor], alpha: float, scale: str = "absorb") -> dict[str, Tensor]:
    """Coefficients from the dense N × N inverse, as the c of least norm with U c = d… from U itself."""
    result = {}
    for layer in LAYERS:
        u = matrix(rows, layer)
        lam = alpha * (u.T @ u).norm()
        batch = u.shape[1]
        c = torch.linalg.inv(u.T @ u + lam * batch * torch.eye(batch)) @ torch.ones(batch)
        dense = torch.linalg.inv(lam * torch.eye(len(u)) + u @ u.T / batch) @ u.mean(1)
        torch.testing.assert_close(u @ c, dense)
        result[layer] = c * lam if scale == "absorb" else c
    return result


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for name, value in expected.items():
        error = (got[name] - value).norm() / value.norm()
        assert error <= tolerance, f"{name}: relative deviation {error:.1e}"
