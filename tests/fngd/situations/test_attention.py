"""Attention and linear functions under every optimiser: the direction is that of dense matrices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from attending import (
    KINDS,
    PLAIN,
    Use,
    columns,
    gradients,
    losses_of,
    moved,
    natural,
    plain_gradient,
    problem,
    separately,
)
from preconditioned import close
from torch import Tensor, nn

from fngd import KFAC, NGD, SKFAC, AdaptiveDamping, Eva, Shampoo
from fngd.optim.layers import Part, scaled_rows

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": "per_layer"},
        {"scale": "graft"},
        {"first": False},
        {"bias": False},
        {"fisher": "true"},
        {"gram": "network"},
        {"gram": "network", "fisher": "true", "scale": "per_layer"},
    ],
    ids=str,
)
def test_natural_gradient_is_the_dense_one(kind: str, options: dict[str, Any]) -> None:
    options = dict(options)
    model, x = problem(kind, first=options.pop("first", True), bias=options.pop("bias", True))
    outputs, uses = separately(model, x)
    torch.testing.assert_close(outputs, model(x))
    losses, g = losses_of(outputs), plain_gradient(model, x)
    drawn = (outputs - 0.3).cos().sum(1)  # the −log p of labels that were "drawn"
    true = options.get("fisher") == "true"
    together = [list(uses)] if options.get("gram") == "network" else [[path] for path in uses]
    expected = {}
    for paths in together:
        u = torch.cat([columns(uses[path], drawn if true else losses) for path in paths])
        flat = torch.cat([uses[path].matrix(g).flatten() for path in paths])
        d = natural(u, flat, 0.1, options.get("scale", "absorb"))
        expected |= dict(zip(paths, d.split([uses[path].matrix(g).numel() for path in paths]), strict=True))
    opt = NGD(model, lr=0.0, alpha=0.1, **options, **PLAIN)
    for _ in range(3):  # functions are new in the first; the third comes after two steps
        opt.zero_grad()
        outputs = model(x)
        if true:
            opt.sample(outputs, lambda outputs: (outputs - 0.3).cos().sum(1))
        losses_of(outputs).mean().backward()
        opt.step()
        got = gradients(model)
        for path, d in expected.items():
            close(uses[path].matrix(got).flatten(), d)
        close(got["scale"], g["scale"])
    assert {path for path, why in opt.explain().items() if why.startswith("reweighted")} == set(uses)


def factors(use: Use, losses: Tensor) -> tuple[Tensor, Tensor]:
    """A, G of a mean loss."""
    x, z = use.rows(losses)
    return torch.einsum("bti,btj->ij", x, x) / len(x), torch.einsum("bto,btp->op", z, z) / (len(x) * x.shape[1])


def kfac(use: Use, losses: Tensor, g: Tensor, damping: float) -> Tensor:
    a, big = factors(use, losses)
    return torch.linalg.solve(torch.kron(big, a) + damping * torch.eye(g.numel()), g.flatten()).view_as(g)


def skfac(use: Use, losses: Tensor, g: Tensor, damping: float) -> Tensor:
    a, big = (each + damping**0.5 * torch.eye(len(each)) for each in factors(use, losses))
    return torch.linalg.solve(torch.kron(big, a), g.flatten()).view_as(g)


def eva(use: Use, losses: Tensor, g: Tensor, damping: float) -> Tensor:
    x, z = use.rows(losses)
    u = torch.outer(z.sum((0, 1)) / len(x), x.mean((0, 1))).flatten()
    return torch.linalg.solve(torch.outer(u, u) + damping * torch.eye(len(u)), g.flatten()).view_as(g)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("build", "oracle"), [(KFAC, kfac), (SKFAC, skfac), (Eva, eva)])
def test_preconditioned_direction_is_the_dense_one(kind: str, first: bool, build: Any, oracle: Any) -> None:
    model, x = problem(kind, first=first)
    outputs, uses = separately(model, x)
    losses, g = losses_of(outputs), plain_gradient(model, x)
    expected = {path: oracle(use, losses, use.matrix(g), 0.1) for path, use in uses.items()}
    opt = build(model, lr=1.0, damping=0.1, kl_clip=None, **PLAIN)
    got = moved(model, opt, x)
    for path, use in uses.items():
        close(use.matrix(got), expected[path])
    close(got["scale"], g["scale"])
    assert {path for path, why in opt.explain().items() if why.startswith("preconditioned")} == set(uses)


def test_shampoo_needs_gradients_alone() -> None:
    model, x = problem("cross")
    g = plain_gradient(model, x)
    got = moved(model, Shampoo(model.parameters(), lr=1.0, graft=False, epsilon=1e-6, **PLAIN), x)
    for name in ("attn.in_proj_weight", "attn.out_proj.weight", "weight"):
        left, right = g[name] @ g[name].T, g[name].T @ g[name]
        roots = []
        for moment in (left, right):
            values, vectors = torch.linalg.eigh(moment)
            roots.append((vectors * (values.clamp_min(0) + 1e-6 * values[-1]) ** -0.25) @ vectors.T)
        close(got[name], (torch.kron(*roots) @ g[name].flatten()).view_as(g[name]))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("time", [3, 4])
def test_an_encoder_layer_sample_by_sample(first: bool, time: int) -> None:
    """Four samples: as many as positions, where axes cannot be told apart by their size."""
    torch.manual_seed(time)
    model = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=first)
    x = torch.randn(4, time, 4)

    def loss(samples: Tensor) -> Tensor:
        return model(samples if first else samples.transpose(0, 1)).sin().sum() / 4

    rows: dict[str, list[Tensor]] = {}
    for sample in x.split(1):
        model.zero_grad()
        (4 * loss(sample)).backward()
        for name, each in gradients(model).items():
            rows.setdefault(name, []).append(each)
    # A time-major model has time on axis 0 of what it is given, so it has to be told.
    opt = NGD(model, lr=0.0, alpha=0.1, batch_axis=None if first else 1, **PLAIN)
    for _ in range(2):
        opt.zero_grad()
        loss(x).backward()
        opt.step()
    got = gradients(model)
    for layer in ("self_attn.in_proj_", "self_attn.out_proj.", "linear1.", "linear2."):
        names = [f"{layer}weight", f"{layer}bias"]
        u = torch.cat([torch.stack(rows[name]).flatten(1) for name in names], 1).T
        close(torch.cat([got[name].flatten() for name in names]), natural(u, u.mean(1), 0.1, "absorb"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_clip_scales_each_row_once(kind: str) -> None:
    model, x = problem(kind)
    outputs, uses = separately(model, x)
    losses, g = losses_of(outputs), plain_gradient(model, x)
    directions = {
        path: natural(columns(use, losses), use.matrix(g).flatten(), 0.1, "absorb") for path, use in uses.items()
    }
    length = sum(0.25 * d @ uses[path].matrix(g).flatten() for path, d in directions.items())
    nu = (1e-4 / length).sqrt()
    assert nu < 1
    change = moved(model, NGD(model, lr=0.5, alpha=0.1, kl_clip=1e-4, **PLAIN), x)
    for path, use in uses.items():
        close(use.matrix(change).flatten() / 0.5, nu * directions[path])
    close(change["scale"] / 0.5, g["scale"])


@pytest.mark.parametrize("build", [KFAC, SKFAC, Eva])
def test_the_clip_of_preconditioned_parts(build: Any) -> None:
    model, x = problem("cross")
    _, uses = separately(model, x)
    g = plain_gradient(model, x)
    opt = build(model, lr=0.5, damping=0.1, kl_clip=None, **PLAIN)
    start = copy.deepcopy(model.state_dict())
    free = moved(model, opt, x)
    opt.remove()
    model.load_state_dict(start)
    clipped = moved(model, build(model, lr=0.5, damping=0.1, kl_clip=1e-4, **PLAIN), x)
    length = sum(0.5 * (use.matrix(free) * use.matrix(g)).sum() for use in uses.values())  # lr²⟨v, g⟩ = lr⟨lr·v, g⟩
    for use in uses.values():
        close(use.matrix(clipped), use.matrix(free) * (1e-4 / length).sqrt())


def test_only_the_rows_of_a_part_are_scaled() -> None:
    parameter = nn.Parameter(torch.zeros(5, 2))
    parts = [Part(parameter, 0, 2), Part(parameter, 1, 3)]
    got = scaled_rows(torch.ones(5, 2), parts, torch.tensor(0.5))
    assert got[:, 0].tolist() == [0.5, 0.5, 0.5, 1.0, 1.0]
    assert parts[0].meets(parts[1])
    assert not parts[0].meets(Part(parameter, 2, 3))
    assert not parts[0].meets(Part(nn.Parameter(torch.zeros(5, 2)), 0, 2))


@pytest.mark.parametrize("kind", ["self", "three", "widths"])
def test_adaptive_damping_predicts_with_the_dense_matrix(kind: str) -> None:
    model, x = problem(kind)
    outputs, uses = separately(model, x)
    losses, g = losses_of(outputs), plain_gradient(model, x)
    own = {path: columns(use, losses) for path, use in uses.items()}
    opt = NGD(model, lr=0.3, alpha=0.1, momentum=0.0, adapt_damping=AdaptiveDamping())
    delta = {name: -each for name, each in moved(model, opt, x).items()}
    expected = (g["scale"] * delta["scale"]).sum()
    for path, use in uses.items():
        u, change, gradient = own[path], use.matrix(delta).flatten(), use.matrix(g).flatten()
        lam = 0.1 * torch.linalg.matrix_norm(u.T @ u)
        curvature = (u.T @ change).square().mean() + lam * change @ change
        expected = expected + gradient @ change + 0.5 * curvature
    close(opt._predicted, expected)
