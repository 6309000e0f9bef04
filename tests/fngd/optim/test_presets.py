"""Presets: 20 steps are those of the public code, written down here in plain matrices, with its defaults."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fngd import KFAC, SKFAC, Eva, Shampoo

STEPS, LR, MOMENTUM, DECAY = 20, 0.05, 0.9, 1e-3

pytestmark = pytest.mark.usefixtures("double")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5))


def batch(step: int, size: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 2, 4, 4, generator=generator), torch.randint(5, (size,), generator=generator)


def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def seen(model: nn.Sequential, step: int) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """[(inputs or patches [N, T, inp], output gradients of the mean loss [N, T, out])], and gradients as matrices."""
    x, y = batch(step)
    hidden = model[0](x)
    flat = model[2](model[1](hidden))
    logits = model[3](flat)
    found = torch.autograd.grad(F.cross_entropy(logits, y), [hidden, logits, *model.parameters()])
    patches = F.unfold(x, 3, padding=1).mT
    rows = [(patches, found[0].flatten(2).mT), (flat.detach().unsqueeze(1), found[1].unsqueeze(1))]
    grads = [
        torch.cat([found[2].flatten(1), found[3].unsqueeze(1)], 1),
        torch.cat([found[4], found[5].unsqueeze(1)], 1),
    ]
    return rows, grads


def ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(*x.shape[:-1], 1)], -1)


def transcribed(direction: Any, clip: float | None) -> list[Tensor]:
    """Preconditions by `direction(layer, x, z, gradient)`, clips, and steps by momentum with weight decay, by hand."""
    model = net()
    buffers: list[Any] = [None, None]
    for step in range(STEPS):
        rows, grads = seen(model, step)
        found = [direction(layer, *rows[layer], grads[layer]) for layer in range(2)]
        if clip is not None:
            total = sum((v * g).sum() * LR**2 for v, g in zip(found, grads, strict=True))
            found = [v * min(1.0, math.sqrt(clip / abs(total))) for v in found]
        for layer, module in enumerate((model[0], model[3])):
            weight = torch.cat([module.weight.detach().flatten(1), module.bias.detach().unsqueeze(1)], 1)
            update = found[layer] + DECAY * weight
            buffers[layer] = update if buffers[layer] is None else MOMENTUM * buffers[layer] + update
            new = weight - LR * buffers[layer]
            with torch.no_grad():
                module.weight.copy_(new[:, :-1].reshape(module.weight.shape))
                module.bias.copy_(new[:, -1])
    return [p.detach() for p in model.parameters()]


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        error = ((one - other).norm() / other.norm()).item()
        assert error <= 1e-6, f"relative deviation {error:.1e}"


OPTIONS: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY}


def test_kfac_pytorch() -> None:
    a: list[Any] = [None, None]
    g: list[Any] = [None, None]

    def direction(layer: int, x: Tensor, z: Tensor, grad: Tensor) -> Tensor:
        pixels = x.shape[1] if layer == 0 else 1
        x, z = ones(x).flatten(0, 1) / pixels, z.flatten(0, 1) / pixels
        for kept, rows in ((a, x), (g, z)):
            before = torch.eye(rows.shape[1]) if kept[layer] is None else kept[layer]
            kept[layer] = 0.95 * before + 0.05 * rows.T @ rows / len(rows)
        d_a, q_a = torch.linalg.eigh(a[layer])
        d_g, q_g = torch.linalg.eigh(g[layer])
        return q_g @ ((q_g.T @ grad @ q_a) / (torch.outer(d_g.clamp(min=0), d_a.clamp(min=0)) + 1e-3)) @ q_a.T

    model = net()
    same(run(model, KFAC(model, preset="kfac-pytorch", **OPTIONS)), transcribed(direction, 1e-3))


def test_eva() -> None:
    kept: list[Any] = [None, None]

    def direction(layer: int, x: Tensor, z: Tensor, grad: Tensor) -> Tensor:
        new = ones(x[:16]).mean((0, 1)), z[:16].mean((0, 1))
        before = kept[layer]
        kept[layer] = new if before is None else tuple(0.05 * b + 0.95 * n for b, n in zip(before, new, strict=True))
        a, b = kept[layer]
        return (grad - (b @ grad @ a) / (a @ a * (b @ b) + 0.03) * torch.outer(b, a)) / 0.03

    model = net()
    same(run(model, Eva(model, preset="eva", **OPTIONS)), transcribed(direction, 1e-3))


def test_skfac() -> None:
    def direction(layer: int, x: Tensor, z: Tensor, grad: Tensor) -> Tensor:
        count, root = len(x), math.sqrt(0.03)
        a, g = ones(x).mean(1) / math.sqrt(count), z.mean(1) * count / math.sqrt(count)
        inverses = []
        for rows in (a, g):
            small = torch.linalg.inv(rows @ rows.T + root * torch.eye(count))
            inverses.append((torch.eye(rows.shape[1]) - rows.T @ small @ rows) / root)
        return inverses[1] @ grad @ inverses[0]

    model = net()
    same(run(model, SKFAC(model, preset="skfac", **OPTIONS)), transcribed(direction, None))


def root_of(matrix: Tensor, power: int, epsilon: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * (values.clamp(min=0) + epsilon * values.max()) ** (-1 / power)) @ vectors.T


@pytest.mark.parametrize(
    ("statistics_every", "inverse_every", "epsilon"), [(1, 1, 1e-12), (2, 6, 1e-8), (10, 100, 1e-12)]
)
def test_shampoo_pytorch(statistics_every: int, inverse_every: int, epsilon: float) -> None:
    """Matrices alone decay, as the public code adds the decay of vectors twice.

    Few gradients leave moments of low rank, of whose other eigenvalues ε = 1e-12 lets rounding be seen.
    """
    model, other = net(), net()

    def decayed(each: nn.Module) -> list[dict[str, Any]]:
        params = list(each.parameters())
        return [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": DECAY},
            {"params": [p for p in params if p.dim() == 1]},
        ]

    every: Any = {"statistics_every": statistics_every, "inverse_every": inverse_every, "epsilon": epsilon}
    options = {} if inverse_every == 100 else every  # the preset's own
    got = run(model, Shampoo(decayed(model), preset="shampoo-pytorch", lr=LR, momentum=MOMENTUM, **options))
    states: dict[int, dict[str, Any]] = {}
    for step in range(1, STEPS + 1):
        x, y = batch(step - 1)
        grads = torch.autograd.grad(F.cross_entropy(other(x), y), list(other.parameters()))
        for number, (param, grad) in enumerate(zip(other.parameters(), grads, strict=True)):
            # [3, 2, 3, 3] has 54 entries and is merged to one dimension: it takes the plain gradient
            shape = {54: None, 240: (5, 48)}.get(param.numel()) if param.dim() > 1 else None
            state = states.setdefault(number, {"momentum": torch.zeros_like(param)})
            update = grad.clone()
            if shape is not None:
                matrix = grad.reshape(shape)
                state.setdefault("moments", [epsilon * torch.eye(size) for size in shape])
                state.setdefault("roots", [torch.eye(size) for size in shape])
                if step % statistics_every == 0:
                    state["moments"][0] += matrix @ matrix.T
                    state["moments"][1] += matrix.T @ matrix
                if step % inverse_every == 0:
                    state["roots"] = [root_of(moment, 4, epsilon) for moment in state["moments"]]
                shaped = state["roots"][0] @ matrix @ state["roots"][1]
                update = (shaped * (grad.norm() / (shaped.norm() + 1e-16))).reshape(param.shape)
            if param.dim() > 1:
                update = update + DECAY * param.detach()
            buffer = state["momentum"]
            buffer.mul_(MOMENTUM).add_(update)
            buffer.mul_(MOMENTUM).add_(update)  # Nesterov's form, which the public code leaves in the buffer
            with torch.no_grad():
                param.sub_(LR * buffer)
    same(got, [p.detach() for p in other.parameters()])


def test_what_is_given_overrides_a_preset() -> None:
    model = net()
    opt = KFAC(model, preset="kfac-pytorch", damping=0.5, inverse_every=7)
    assert opt.param_groups[0]["damping"] == 0.5
    assert (opt._inverse_every, opt._statistics_every) == (7, 1)
    opt.remove()
    assert KFAC(model).param_groups[0]["damping"] == 0.03


@pytest.mark.parametrize("build", [KFAC, Eva, SKFAC, lambda model, **o: Shampoo(model.parameters(), **o)])
def test_an_unknown_preset_is_told(build: Any) -> None:
    with pytest.raises(ValueError, match=r"preset='mine' is unknown; choose one of \[None, "):
        build(net(), preset="mine")
