"""Attention and linear functions under every optimiser: dense matrices, parts of parameters, resuming."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attending import KINDS, Attending, Use, gradients, losses_of, moved, problem, separately, step
from preconditioned import close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fngd import FNGD, KFAC, NGD, SKFAC, AdaptiveDamping, Eva, Shampoo
from fngd.members import Part, members, scaled_rows
from fngd.natural import NaturalSGD

pytestmark = pytest.mark.usefixtures("double")
PLAIN = {"momentum": 0.0}


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
    for _ in range(2):
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


# --- parts of parameters --------------------------------------------------------------------------------------

MAKERS: dict[str, Any] = {
    "ngd": lambda model: NGD(model, lr=0.1, kl_clip=1e-3),
    "ngd true": lambda model: NGD(model, lr=0.1, fisher="true", seed=3),
    "ngd adaptive": lambda model: NGD(model, lr=0.1, adapt_damping=AdaptiveDamping(every=1), accumulate="joint"),
    "fngd": lambda model: FNGD(model, lr=0.1, steps_per_epoch=2, other="adamw"),
    "fngd sample": lambda model: FNGD(model, lr=0.1, steps_per_epoch=2, share="sample", samples=10),
    "kfac": lambda model: KFAC(model, lr=0.1, statistics_every=2, inverse_every=3),
    "skfac": lambda model: SKFAC(model, lr=0.1, every=2),
    "eva": lambda model: Eva(model, lr=0.1, other="adamw"),
    "shampoo": lambda model: Shampoo(model.parameters(), lr=0.1, statistics_every=2, inverse_every=2),
}


def train(model: Attending, optimizer: Any, numbers: range) -> None:
    for number in numbers:
        x = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(number))
        if isinstance(optimizer, FNGD) and optimizer._table.share == "sample":
            optimizer.next_batch(torch.arange(5) + 5 * (number % 2))
        outputs = model(x)
        if isinstance(optimizer, NaturalSGD) and optimizer._method.fisher == "true":
            optimizer.sample(outputs, "gaussian")
        loss = losses_of(outputs).mean()
        loss.backward()
        optimizer.step()
        if getattr(optimizer, "measuring", False):
            optimizer.adapt(loss, losses_of(model(x)).mean())
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["cross", "widths"])
@pytest.mark.parametrize("name", MAKERS)
def test_resuming_is_bit_for_bit(name: str, kind: str) -> None:
    """The state is saved after each of the first steps, and loaded before any function is known."""
    model, _ = problem(kind)
    start = copy.deepcopy(model)
    optimizer = MAKERS[name](model)
    files, weights = [], []
    for number in range(6):
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        files.append(file)
        train(model, optimizer, range(number, number + 1))
        weights.append(copy.deepcopy(model.state_dict()))
    for at in (0, 1, 3):
        files[at].seek(0)
        values, state = torch.load(files[at], weights_only=True)
        other = copy.deepcopy(start)
        other.load_state_dict(values)
        resumed = MAKERS[name](other)
        resumed.load_state_dict(state)
        train(other, resumed, range(at, 6))
        for key, value in weights[-1].items():
            assert torch.equal(value, other.state_dict()[key]), key
    assert not torch.equal(weights[0]["attn.in_proj_bias"], weights[-1]["attn.in_proj_bias"])


@pytest.mark.parametrize("name", ["ngd", "kfac", "skfac", "eva"])
def test_copies_are_inert_and_ordinary_afterwards(name: str) -> None:
    model, x = problem("cross")
    optimizer = MAKERS[name](model)
    step(model, optimizer, x)
    other = copy.deepcopy(model)
    other.zero_grad()
    losses_of(other(x)).mean().backward()
    for key, value in plain_gradient(other, x).items():
        close(other.get_parameter(key).grad, value, 1e-12)
    optimizer.remove()
    model.zero_grad()
    losses_of(model(x)).mean().backward()
    for key, value in gradients(other).items():
        close(model.get_parameter(key).grad, value, 1e-12)
    assert all(type(each) is nn.Parameter for net in (model, other) for each in net.parameters())


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


class Rows(nn.Module):
    """A function that is given rows of a parameter by the model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.weight = nn.Linear(3, 4), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inp(x).tanh()
        return F.linear(y, self.weight[:3]).sin() + (y @ self.weight[3:].T).sum(1, keepdim=True)


@pytest.mark.parametrize("build", [NGD, KFAC, SKFAC, Eva])
def test_rows_that_a_model_takes_itself_stay_plain_and_are_named(build: Any) -> None:
    torch.manual_seed(0)
    model, x = Rows(), torch.randn(6, 3)
    (g,) = torch.autograd.grad(losses_of(model(x)).mean(), model.weight)
    opt = build(model, lr=1.0, **PLAIN)
    close(moved(model, opt, x)["weight"], g, 1e-12)
    assert opt.explain()["weight"].startswith("plain: it was given to '__getitem__'")


# --- what stays plain -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [NGD, KFAC, SKFAC, Eva])
def test_groups_frozen_parts_and_functions_false(build: Any) -> None:
    model, x = problem("cross")
    g = plain_gradient(model, x)
    attention = list(model.attn.parameters())
    others = [each for each in model.parameters() if all(each is not own for own in attention)]
    start = copy.deepcopy(model.state_dict())
    for options, groups in (
        ({}, [{"params": others}, {"params": attention, "precondition": False}]),
        ({"functions": False}, None),
    ):
        opt = build(model, groups, lr=1.0, **options, **PLAIN)
        change = moved(model, opt, x)
        why = opt.explain()
        opt.remove()
        model.load_state_dict(start)
        for name in ("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"):
            close(change[name], g[name], 1e-12)
        assert ((change["weight"] - g["weight"]).norm() > 1e-3) == (not options)
        assert all(reason.startswith("plain: ") for path, reason in why.items() if "attn" in path)
        assert len([path for path in why if "attn" in path]) >= 2
    model.attn.in_proj_bias.requires_grad_(False)
    model.attn.out_proj.weight.requires_grad_(False)
    opt = build(model, lr=1.0, **PLAIN)
    assert opt.explain()["attn.in_proj_weight"] == "plain so far: its function has not been called"
    change = moved(model, opt, x)
    assert opt.explain()["attn.out_proj"] == "plain: its weight is frozen"
    assert not change["attn.in_proj_bias"].any()
    assert not change["attn.out_proj.weight"].any()
    close(change["attn.out_proj.bias"], g["attn.out_proj.bias"], 1e-12)
    assert (change["attn.in_proj_weight"] - g["attn.in_proj_weight"]).norm() > 1e-3


def test_adamw_for_what_is_not_known_to_be_linear() -> None:
    model, x = problem("cross")
    opt = NGD(model, lr=0.1, other="adamw")
    rules = {id(param): group["rule"] for group in opt.param_groups for param in group["params"]}
    named = {name: rules[id(param)] for name, param in model.named_parameters()}
    assert {name for name, rule in named.items() if rule == "adamw"} == {"weight", "bias", "scale"}
    step(model, opt, x)
    assert opt.explain()["weight"] == "plain: its weight is in a group with precondition=False"
    assert opt.explain()["attn.in_proj_weight[0:4]"].startswith("reweighted")


class Shared(nn.Module):
    """A layer's weight is a function's, too; an embedding's is an output layer's; a bias is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.single = nn.Embedding(6, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.weight, self.offset = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.linear(self.layer(self.table(ids)).tanh(), self.layer.weight).tanh()
        x = F.linear(self.single(x), self.weight, 2 * self.offset)
        return F.linear(x, self.table.weight)


@pytest.mark.parametrize("build", [KFAC, SKFAC, Eva])
def test_shared_weights_are_plain_and_named(build: Any) -> None:
    torch.manual_seed(0)
    model, ids = Shared(), torch.randint(6, (5,))
    losses_of(model(ids)).mean().backward()
    g = gradients(model)
    opt = build(model, lr=1.0, **PLAIN)
    change = moved(model, opt, ids)
    for name, value in g.items():
        assert ("single" in name) == ((change[name] - value).norm() > 1e-3), name
    why = opt.explain()
    assert why["layer"] == why["layer.weight"] == "plain: its weight is used by several layers: 'layer', 'layer.weight'"
    assert why["table.weight"] == "plain: its weight is an embedding's, too"
    assert why["weight"] == "plain: its bias is no parameter, nor rows of one"
    assert why["single"].startswith("preconditioned")


@pytest.mark.parametrize("build", [KFAC, SKFAC, Eva])
def test_a_layer_that_is_called_only_later(build: Any) -> None:
    """Its weight was a function's; from then on both are plain."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.late = nn.Linear(3, 3), False

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(x, self.layer.weight, self.layer.bias).tanh()
            return self.layer(x) if self.late else x

    torch.manual_seed(0)
    model, x = Late(), torch.randn(5, 3)
    opt = build(model, lr=1.0, **PLAIN)
    step(model, opt, x)
    assert opt.explain()["layer.weight"].startswith("preconditioned")
    model.late = True
    change = moved(model, opt, x)
    close(change["layer.weight"], model.layer.weight.grad, 1e-12)
    close(change["layer.bias"], model.layer.bias.grad, 1e-12)
    assert "several layers: 'layer', 'layer.weight'" in opt.explain()["layer"]


def test_shared_weights_have_a_block_for_each_use() -> None:
    torch.manual_seed(0)
    model, ids = Shared(), torch.randint(6, (5,))
    losses_of(model(ids)).mean().backward()
    g = gradients(model)
    opt = NGD(model, lr=1.0, **PLAIN)
    step(model, opt, ids)
    why = opt.explain()
    assert {path for path, reason in why.items() if reason.startswith("reweighted")} == {
        "layer", "layer.weight", "single", "table.weight"
    }  # fmt: skip
    assert why["weight"] == "plain: its bias is no parameter, nor rows of one"
    close(model.weight.grad, g["weight"], 1e-12)
    opt.remove()
    opt = NGD(model, adapt_damping=AdaptiveDamping())
    with pytest.raises(ValueError, match=r"cannot predict the step of 'table.weight': its weight is an embedding's"):
        step(model, opt, ids)


def test_members_of_what_is_no_layer() -> None:
    model, _ = problem("self")
    opt = NGD(model)
    assert members(opt._handle, "nothing") == (None, None)
    with pytest.raises(ValueError, match="factors of layers"):
        state = KFAC(copy.deepcopy(model)).state_dict()
        state["preconditioner"]["running"]["attn.wrong_weight[0:2]"] = {}
        KFAC(copy.deepcopy(model)).load_state_dict(state)


def test_a_whole_transformer_and_its_evaluation() -> None:
    """Evaluation takes torch's fast path as before; coefficients are computed once and shared."""
    torch.manual_seed(0)
    model = nn.Transformer(4, 2, 1, 1, 6, dropout=0.0, batch_first=True)
    x, y = torch.randn(3, 4, 4), torch.randn(3, 5, 4)
    opt = FNGD(model, lr=0.1, steps_per_epoch=1)
    for _ in range(3):
        opt.zero_grad()
        model(x, y).sin().square().mean().backward()
        opt.step()
    paths = {path for path, why in opt.explain().items() if why.startswith("reweighted")}
    assert len(paths) == 6 + 4 + 1  # two and a half attentions in two or three layers, four linear layers
    assert {key[0] for key in opt._table._rows} == paths
    model.eval()
    with torch.no_grad():
        got = model(x, y)
    opt.remove()
    with torch.no_grad():
        torch.testing.assert_close(got, model(x, y))


# --- other ways to run a model --------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [FNGD, KFAC])
def test_attention_in_a_checkpoint(build: Any) -> None:
    """What a checkpoint runs again in the backward pass is preconditioned as what runs once."""

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module, used: bool) -> None:
            super().__init__()
            self.inner, self.used = inner, used

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False) if self.used else self.inner(x)

    inner, x = problem("three")
    models = [Checkpointed(copy.deepcopy(inner), used) for used in (False, True)]
    more = {"steps_per_epoch": 1} if build is FNGD else {"inverse_every": 2}
    for model in models:
        opt = build(model, lr=0.1, **more)
        for _ in range(3):
            step(model, opt, x)
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        close(second.detach(), first.detach(), 1e-12)


@pytest.mark.filterwarnings("ignore")  # Dynamo warns about the shape checks that only tests install
@pytest.mark.parametrize("build", [FNGD, pytest.param(KFAC, marks=pytest.mark.slow)])
def test_attention_under_torch_compile(build: Any) -> None:
    """It stays out of the graph, and is preconditioned as ever; without functions one graph is possible."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    first, x = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), torch.randn(5, 3, 4)
    second = copy.deepcopy(first)
    more = {"steps_per_epoch": 1} if build is FNGD else {}
    opts = [build(model, lr=0.1, **more) for model in (first, second)]
    for _ in range(3):
        for model, opt in zip((first, torch.compile(second, backend="eager")), opts, strict=True):
            opt.zero_grad()
            model(x).sin().sum().backward()
            opt.step()
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        close(two.detach(), one.detach(), 1e-10)
    assert "plain" not in opts[1].explain()["self_attn.in_proj_weight"]
    torch._dynamo.reset()


ONE_GRAPH = """
import warnings, torch, fngd
from torch import nn
warnings.simplefilter("ignore")
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.places = nn.Linear(3, 4), nn.Parameter(torch.randn(5, 4))  # as many models have for positions
    def forward(self, x):
        return (self.inp(x) + self.places).tanh().sum(1)
for functions in (False, True):
    torch._dynamo.reset()
    model = nn.Sequential(Model())
    opt = fngd.NGD(model, lr=0.1, functions=functions)
    print(functions, torch._dynamo.explain(model)(torch.randn(6, 5, 3)).graph_break_count > 0)
"""


@pytest.mark.slow
def test_without_functions_a_model_with_a_matrix_is_one_graph() -> None:
    """In a process of its own: Dynamo cannot trace the shape checks of the tests."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = subprocess.run([sys.executable, "-c", ONE_GRAPH], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False", "True", "True"]
