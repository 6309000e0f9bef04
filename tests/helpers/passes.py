"""What tests of passes share: ways to ask, the expected gradients, a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import loop_grads_of
from torch import Tensor, nn
from torch.nn import functional as F

from persample.reweighting import LayerGrads, Reweighting, reweight

B = 4
FACTORS = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)

Losses = Callable[[], Tensor]
Groups = dict[str, list[str]]
"""Layer → its parameters."""


def solved(gram: Tensor) -> Tensor:
    """Factors from a Gram matrix, scaled so that the matrix matters."""
    return torch.linalg.solve(gram / gram.diagonal().mean().clamp_min(1e-30) + torch.eye(len(gram)), torch.ones(B))


def modules_of(model: nn.Module) -> Groups:
    return {
        path: [f"{path}.{name}" if path else name for name, _ in module.named_parameters()]
        for path, module in model.named_modules()
        if isinstance(module, KINDS)
    }


class Mode:
    """How reweighting is asked for: layer by layer or jointly, with fixed factors or those of a Gram matrix."""

    def __init__(self, joint: bool, gram: bool) -> None:
        self.joint, self.gram = joint, gram
        self.asked: list[tuple[str, ...]] = []

    def factors(self, grads: LayerGrads) -> Tensor:
        return solved(grads.gram()) if self.gram else FACTORS

    def policy(self, *args: Any) -> Any:
        if self.joint:
            self.asked.append(tuple(args[0]))
            return {path: self.factors(grads) for path, grads in args[0].items()}
        self.asked.append((args[0],))
        return self.factors(args[1])

    def on(self, model: nn.Module, **options: Any) -> Reweighting:
        self.asked.clear()
        return reweight(model, self.policy, joint=self.joint, **options)

    def expected(self, model: nn.Module, losses: Tensor, groups: Groups | None = None) -> dict[str, Tensor]:
        """Σ_b c_b g_b from one backward pass for each sample; to be called while the model is not reweighted."""
        groups = modules_of(model) if groups is None else groups
        rows = loop_grads_of(losses, dict(model.named_parameters()))
        total = {name: row.sum(0) for name, row in rows.items()}
        for names in groups.values():
            flat = torch.cat([rows[name].flatten(1) for name in names], 1)
            c = solved(flat @ flat.T) if self.gram else FACTORS
            total.update({name: torch.tensordot(c, rows[name], 1) for name in names})
        return total


MODES = [Mode(joint, gram) for joint in (False, True) for gram in (False, True)]
every_mode = pytest.mark.parametrize(
    "mode", MODES, ids=[f"{'joint' if m.joint else 'apart'}-{'gram' if m.gram else 'fixed'}" for m in MODES]
)
each_asking = pytest.mark.parametrize("mode", MODES[::2], ids=["apart", "joint"])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Zeros where there is none."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def same(got: dict[str, Tensor], *expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for name, value in got.items():
        total = sum(each[name] for each in expected)
        torch.testing.assert_close(
            value, total, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def step(model: nn.Module, losses: Losses) -> dict[str, Tensor]:
    model.zero_grad()
    losses().sum().backward()
    return gradients(model)


def squares(output: Tensor) -> Tensor:
    return output.sin().flatten(1).sum(1)


class Loop(nn.Module):
    """Applies one layer any number of times."""

    def __init__(self, cell: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.inp, self.cell, self.head = nn.Linear(6, 6), cell, head or nn.Linear(6, 2)

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        h = self.inp(x).tanh()
        for _ in range(times):
            h = self.cell(h).tanh()
        return self.head(h)


class Function(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class Folded(nn.Module):
    """A convolution over [batch, positions, features], as channels and space."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        space = (6,) if isinstance(self.conv, nn.Conv1d | nn.ConvTranspose1d) else (2, 3)
        return self.conv(x.unflatten(-1, space)).flatten(2)


CELLS: dict[str, tuple[Callable[[], nn.Module], Groups]] = {
    "linear": (lambda: nn.Linear(6, 6), {}),
    "linear, no bias": (lambda: nn.Linear(6, 6, bias=False), {}),
    "function": (Function, {"cell.weight": ["cell.weight", "cell.bias"]}),
    "attention": (
        Attention,
        {
            "cell.attn.in_proj_weight": ["cell.attn.in_proj_weight", "cell.attn.in_proj_bias"],
            "cell.attn.out_proj": ["cell.attn.out_proj.weight", "cell.attn.out_proj.bias"],
        },
    ),
    "conv1d": (lambda: Folded(nn.Conv1d(5, 5, 3, padding=1)), {}),
    "conv1d groups": (lambda: Folded(nn.Conv1d(5, 5, 2, padding="same", groups=5, padding_mode="circular")), {}),
    "conv2d": (lambda: Folded(nn.Conv2d(5, 5, (1, 2), padding="same", bias=False)), {}),
    "conv2d reflect": (lambda: Folded(nn.Conv2d(5, 5, 3, padding=1, padding_mode="reflect")), {}),
    "transposed": (lambda: Folded(nn.ConvTranspose1d(5, 5, 2, padding=2, output_padding=1, dilation=3)), {}),
    "transposed 2d": (lambda: Folded(nn.ConvTranspose2d(5, 5, 3, padding=1)), {}),
}


def groups_of(model: nn.Module, functions: Groups) -> Groups:
    inside = {name for names in functions.values() for name in names}
    return {path: names for path, names in modules_of(model).items() if not set(names) & inside} | functions


class Branches(nn.Module):
    """A trunk that is called twice, two heads on it, and one on the side."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right, self.side = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.middle = self.trunk(x).tanh()
        h = self.trunk(self.middle).tanh()
        return self.left(h), self.right(h), self.side(x)


def branch(model: Branches, x: Tensor, place: int) -> Tensor:
    return squares(model(x)[place])


class Stop(Exception):
    pass


def stop(*_: Any) -> None:
    raise Stop


class Tokens(nn.Module):
    """Embedding, something in between, and two linear layers."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.table, self.between = nn.Embedding(20, 6), nn.Identity() if between is None else between
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(self.table(x))
        h = h[0] if isinstance(h, tuple) else h
        return self.out(self.layer(h).tanh())


def of_samples(output: Tensor) -> Tensor:
    """[T, B, O] → [B]."""
    return output.sin().mean((0, 2))
