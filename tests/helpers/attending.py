"""What the tests of attention and functions share: a model with both, and the same in separate linear operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

E, HEADS, TIME = 4, 2, 3
KINDS = ("self", "cross", "three", "widths")
PLAIN = {"momentum": 0.0}


class Attending(nn.Module):
    """A linear layer, attention of one kind, a linear function and a bare parameter. [batch, TIME, 3] → [batch, 2]."""

    def __init__(self, kind: str = "cross", *, first: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.kind, self.first = kind, first
        self.inp = nn.Linear(3, E)
        widths = {"kdim": 3, "vdim": 3} if kind == "widths" else {}
        self.attn = nn.MultiheadAttention(E, HEADS, bias=bias, batch_first=first, **widths)
        nn.init.normal_(self.attn.out_proj.weight)
        if bias:
            nn.init.normal_(self.attn.in_proj_bias)
        self.weight, self.bias = nn.Parameter(torch.randn(2, E)), nn.Parameter(torch.randn(2))
        self.scale = nn.Parameter(torch.ones(E))

    def sources(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before their projections; the same object where they are the same."""
        y = self.inp(x).tanh()
        other = {"self": y, "cross": y.flip(-1), "three": y.flip(-1), "widths": x}[self.kind]
        return y, other, other.sin() if self.kind == "three" else other

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.sources(x if self.first else x.transpose(0, 1))
        out, _ = self.attn(q, k, v, need_weights=False)
        return F.linear((out * self.scale).tanh(), self.weight, self.bias).mean(1 if self.first else 0)


@dataclass
class Use:
    """A layer: its input and output [batch, TIME, features], and where its weight and bias are."""

    x: Tensor
    output: Tensor
    weight: tuple[str, slice]
    bias: tuple[str, slice] | None

    def rows(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """(x, 1 appended for the bias; z of each sample's own loss)."""
        (z,) = torch.autograd.grad(losses.sum(), self.output, retain_graph=True)
        x = self.x.detach()
        return (x if self.bias is None else torch.cat([x, torch.ones(*x.shape[:2], 1)], 2)), z

    def matrix(self, tensors: dict[str, Tensor]) -> Tensor:
        """[out, inp (+ 1)] of something that is like the parameters."""
        weight = tensors[self.weight[0]][self.weight[1]]
        return weight if self.bias is None else torch.cat([weight, tensors[self.bias[0]][self.bias[1]][:, None]], 1)


def separately(model: Attending, x: Tensor) -> tuple[Tensor, dict[str, Use]]:
    """What the model returns, by linear operations of which each is a layer by the name that it should have."""
    own, uses = dict(model.named_parameters()), {}

    def linear(path: str, x: Tensor, weight: str, bias: str, rows: slice = slice(None), at: int = 0) -> Tensor:
        part = own[weight][rows]
        places = slice(at, at + len(part))
        output = F.linear(x, part, own[bias][places] if bias in own else None)
        uses[path] = Use(x, output, (weight, rows), (bias, places) if bias in own else None)
        return output

    y = linear("inp", x, "inp.weight", "inp.bias").tanh()
    other = {"self": y, "cross": y.flip(-1), "three": y.flip(-1), "widths": x}[model.kind]
    third = other.sin() if model.kind == "three" else other
    name, bias = "attn.in_proj_weight", "attn.in_proj_bias"
    if model.kind == "self":
        q, k, v = linear(name, y, name, bias).chunk(3, -1)
    elif model.kind == "cross":
        q = linear(f"{name}[0:4]", y, name, bias, slice(0, 4))
        k, v = linear(f"{name}[4:12]", other, name, bias, slice(4, 12), 4).chunk(2, -1)
    elif model.kind == "three":
        q, k, v = (
            linear(f"{name}[{at}:{at + 4}]", each, name, bias, slice(at, at + 4), at)
            for at, each in ((0, y), (4, other), (8, third))
        )
    else:
        q, k, v = (
            linear(f"attn.{which}_proj_weight", each, f"attn.{which}_proj_weight", bias, at=at)
            for which, each, at in (("q", y, 0), ("k", other, 4), ("v", third, 8))
        )
    heads = [each.unflatten(-1, (HEADS, E // HEADS)).transpose(1, 2) for each in (q, k, v)]
    mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    out = linear("attn.out_proj", mixed, "attn.out_proj.weight", "attn.out_proj.bias")
    return linear("weight", (out * own["scale"]).tanh(), "weight", "bias").mean(1), uses


def losses_of(outputs: Tensor) -> Tensor:
    """One loss for each sample."""
    return outputs.sin().square().sum(1)


def problem(kind: str, *, first: bool = True, bias: bool = True, size: int = 5) -> tuple[Attending, Tensor]:
    torch.manual_seed(KINDS.index(kind) + 10 * size)
    return Attending(kind, first=first, bias=bias), torch.randn(size, TIME, 3)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def step(model: nn.Module, optimizer: Any, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> None:
    optimizer.zero_grad()
    (losses_of(model(x)).mean() if loss is None else loss(model(x))).backward()
    optimizer.step()


def moved(model: nn.Module, optimizer: Any, x: Tensor) -> dict[str, Tensor]:
    """What a step subtracts, by parameter."""
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    step(model, optimizer, x)
    return {name: before[name] - each.detach() for name, each in model.named_parameters()}


def columns(use: Use, losses: Tensor) -> Tensor:
    """U [N, B]: the samples' own gradients."""
    x, z = use.rows(losses)
    return torch.einsum("bto,bti->boi", z, x).flatten(1).T


def natural(u: Tensor, g: Tensor, alpha: float, scale: str) -> Tensor:
    """(λI + UUᵀ/B)⁻¹ g from the N × N matrix."""
    lam = alpha * torch.linalg.matrix_norm(u.T @ u)
    d = torch.linalg.solve(lam * torch.eye(len(u)) + u @ u.T / u.shape[1], g)
    return {"absorb": d * lam, "per_layer": d, "graft": d * g.norm() / d.norm()}[scale]


def plain_gradient(model: Attending, x: Tensor) -> dict[str, Tensor]:
    own = dict(model.named_parameters())
    found = torch.autograd.grad(losses_of(separately(model, x)[0]).mean(), list(own.values()), allow_unused=True)
    return {name: each for name, each in zip(own, found, strict=True) if each is not None}
