"""The options of NGD and FNGD against matrices that are built sample by sample, in float64 to 1e-8."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import persample
from fngd import FNGD, NGD, smw_coefficients
from fngd.adaptive import AdaptiveDamping
from fngd.diagnostics import effective_rank
from fngd.kl_clip import kl_clip_bound

Batch = tuple[Tensor, Tensor]
LAYERS = ("conv", "inner", "head")
TOLERANCE = 1e-8


class Small(nn.Module):
    """A convolution, a linear layer with positions, one without a bias, and a normalisation."""

    def __init__(self, channels: int = 2, width: int = 3, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, stride=2)
        self.inner = nn.Linear(width, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x), inplace=True).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.inner(x)).tanh().mean(1))


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def data(size: int, channels: int = 2, classes: int = 3) -> Batch:
    return torch.randn(size, channels, 5, 5), torch.randint(classes, (size,))


def rows(model: Small, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Each sample's own gradients, name -> [B, *shape], and s_b = ‖∂ℓ_b/∂logits‖²; from a clean copy."""
    clean = Small(model.conv.in_channels, model.conv.out_channels, model.head.out_features)
    clean.load_state_dict(model.state_dict())
    grads, squares = [], []
    for x, y in zip(*batch, strict=True):
        logits = clean(x[None])
        loss = F.cross_entropy(logits, y[None])
        squares.append(torch.autograd.grad(loss, logits, retain_graph=True)[0].square().sum())
        grads.append(torch.autograd.grad(loss, list(clean.parameters())))
    names = [name for name, _ in clean.named_parameters()]
    return dict(zip(names, map(torch.stack, zip(*grads, strict=True)), strict=True)), torch.stack(squares)


def matrix(own: dict[str, Tensor], *layers: str) -> Tensor:
    """U [N, B] of one layer or several."""
    return torch.cat([row.flatten(1) for name, row in own.items() if name.split(".")[0] in layers], 1).T


def vector(grads: dict[str, Tensor], *layers: str) -> Tensor:
    return torch.cat([grad.flatten() for name, grad in grads.items() if name.split(".")[0] in layers])


def dense(u: Tensor, alpha: float, s: Tensor | None = None, scale: str = "absorb") -> Tensor:
    """(λI + UUᵀ/B)⁻¹ U s/B from the N × N matrix; times λ with "absorb", of the length of g with "graft"."""
    batch = u.shape[1]
    lam = alpha * (u.T @ u).norm()
    s = torch.ones(batch) if s is None else s
    d = torch.linalg.solve(lam * torch.eye(len(u)) + u @ u.T / batch, u @ s / batch)
    if scale == "graft":
        return d * u.mean(1).norm() / d.norm()
    return d * lam if scale == "absorb" else d


def backward(model: nn.Module, batch: Batch, *, factor: float = 1.0, reduction: str = "mean") -> dict[str, Tensor]:
    model.zero_grad()
    (factor * F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    error = ((got - expected).norm() / expected.norm()).item()
    assert error <= tolerance, f"relative deviation {error:.1e}"


shapes = st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(1, 4), st.integers(2, 5))


@given(
    shape=shapes,
    seed=st.integers(0, 10**6),
    log_alpha=st.floats(-3, 0.5),
    scale=st.sampled_from(["absorb", "per_layer", "graft"]),
    fisher=st.sampled_from(["empirical", "improved"]),
    gram=st.sampled_from(["layer", "network"]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_directions_equal_dense_matrices(
    shape: tuple[int, int, int, int],
    seed: int,
    log_alpha: float,
    scale: str,
    fisher: str,
    gram: str,
    reduction: str,
) -> None:
    size, channels, width, classes = shape
    torch.manual_seed(seed)
    model, batch, alpha = Small(channels, width, classes), data(size, channels, classes), 10**log_alpha
    own, squares = rows(model, batch)
    opt = NGD(model, lr=0.0, alpha=alpha, scale=scale, fisher=fisher, gram=gram, reduction=reduction)
    got = backward(model, batch, reduction=reduction)
    opt.remove()
    times = size if reduction == "sum" else 1
    for layers in [LAYERS] if gram == "network" else [(layer,) for layer in LAYERS]:
        u = matrix(own, *layers)
        if u.norm() > 1e-12:  # every unit of the ReLU may be off
            close(vector(got, *layers) / times, dense(u, alpha, squares if fisher == "improved" else None, scale))
    close(vector(got, "norm") / times, matrix(own, "norm").mean(1))  # as ever


def test_coefficients_with_a_right_hand_side() -> None:
    u, s = torch.randn(3, 20, 6), torch.rand(3, 6)
    c = smw_coefficients(u.mT @ u, alpha=1e-3, rhs=s)
    for each, coefficients, right in zip(u, c, s, strict=True):
        close(each @ coefficients, dense(each, 1e-3, right))
    torch.testing.assert_close(smw_coefficients(torch.zeros(4, 4), alpha=0.1, rhs=s[0, :4]), s[0, :4] / 4)
    with pytest.raises(Exception, match=r"rhs has shape \[5\]; with this gram it must be \[4\]|[Tt]ype-check"):
        smw_coefficients(torch.eye(4), alpha=0.1, rhs=torch.ones(5))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fisher", ["empirical", "improved"])
def test_several_forward_passes_keep_their_own_outputs(fisher: str, accumulate: int) -> None:
    model, batches = Small(), [data(4), data(3)]
    opt = NGD(model, lr=0.0, alpha=1e-2, fisher=fisher)
    losses = [F.cross_entropy(model(x), y) for x, y in batches]  # both before either backward pass
    expected = sum(
        dense(matrix(own, "inner"), 1e-2, s if fisher == "improved" else None)
        for own, s in (rows(model, batch) for batch in batches)
    )
    if accumulate == 2:
        for loss in losses:
            loss.backward()
    else:
        sum(losses).backward()
    close(vector({name: p.grad for name, p in model.named_parameters()}, "inner"), expected)
    opt.remove()


@pytest.mark.parametrize("options", [{}, {"gram": "network"}, {"scale": "graft"}, {"fisher": "improved"}])
def test_stored_coefficients(options: dict[str, Any]) -> None:
    """The second epoch has other samples: stored c; but grafting takes the lengths of the present gradients."""
    model, first, second = Small(), data(5), data(5)
    own, squares = rows(model, first)
    later, _ = rows(model, second)
    opt = FNGD(model, lr=0.0, alpha=1e-3, steps_per_epoch=1, **options)
    backward(model, first)
    opt.step()
    got = backward(model, second)
    for layers in [LAYERS] if options.get("gram") else [(layer,) for layer in LAYERS]:
        u = matrix(own, *layers)
        s = squares if options.get("fisher") else None
        d = matrix(later, *layers) @ smw_coefficients(u.T @ u, alpha=1e-3, rhs=s)
        if options.get("scale"):
            d *= matrix(later, *layers).mean(1).norm() / d.norm()
        close(vector(got, *layers), d)


def test_the_scaler_is_taken_out_before_any_gram() -> None:
    model, batch = Small(), data(5)
    own, squares = rows(model, batch)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))  # the scale exists from its first use on
    for options in ({"scale": "per_layer"}, {"damping": 0.05, "alpha": None}, {"fisher": "improved"}):
        opt = NGD(model, lr=0.0, scaler=scaler, **{"alpha": 1e-2, **options})
        got = backward(model, batch, factor=1024.0)
        for layer in LAYERS:
            u = matrix(own, layer)
            alpha = options.get("damping", 0) / (u.T @ u).norm().item() or 1e-2
            s = squares if options.get("fisher") else None
            close(vector(got, layer) / 1024, dense(u, alpha, s, options.get("scale", "absorb")))
        opt.remove()


@pytest.mark.parametrize("gram", ["layer", "network"])
@pytest.mark.parametrize("kappa", [1e-6, 1e-5, 1e3])
def test_kl_clip(kappa: float, gram: str) -> None:
    """ν from explicitly built vectors, with each group's scheduled rate; normalisations are not scaled."""
    model, batch = Small(), data(5)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    own, _ = rows(model, batch)
    groups = [
        {"params": [*model.conv.parameters(), *model.inner.parameters(), *model.norm.parameters()]},
        {"params": model.head.parameters(), "lr": 0.5},
    ]
    opt = NGD(model, groups, lr=0.2, momentum=0.0, alpha=1e-2, kl_clip=kappa, gram=gram)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.2)
    rates = {"conv": 0.04, "inner": 0.04, "head": 0.1, "norm": 0.04}
    whole = dense(matrix(own, *LAYERS), 1e-2)
    parts = dict(zip(LAYERS, whole.split([len(matrix(own, layer)) for layer in LAYERS]), strict=True))
    directions = {layer: parts[layer] if gram == "network" else dense(matrix(own, layer), 1e-2) for layer in LAYERS}
    total = sum(rates[layer] ** 2 * directions[layer] @ matrix(own, layer).mean(1) for layer in LAYERS)
    nu = min(1.0, math.sqrt(kappa / total))
    assert (nu == 1) == (kappa == 1e3)
    seen = backward(model, batch)
    opt.step()
    moved = {name: start[name] - p.detach() for name, p in model.named_parameters()}
    for layer in LAYERS:
        close(vector(moved, layer), rates[layer] * nu * directions[layer])
    close(vector(moved, "norm"), 0.04 * matrix(own, "norm").mean(1))
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, seen[name]), "gradients are left as they were"


def test_kl_clip_bounds_accumulated_passes() -> None:
    d, g = torch.randn(2, 3, 7)
    metric = torch.rand(7)
    d = metric * g  # a shared metric
    inner = [[(0.3, d[i] @ g[i])] for i in range(3)]
    exact = 0.09 * (d.sum(0) @ g.sum(0))
    assert kl_clip_bound(inner, 1e-3) <= torch.sqrt(1e-3 / exact)
    same = [[(0.3, d[0] @ g[0])]] * 3  # equal passes: no slack
    close(kl_clip_bound(same, 1e-3), torch.sqrt(1e-3 / (0.09 * 9 * d[0] @ g[0])))
    assert kl_clip_bound([[(0.3, torch.zeros(()))]], 1e-3) == 1


def test_refresh_by_cosine() -> None:
    """A probe in the first batch decides at the end of the epoch; the probed step itself keeps what is stored."""
    model, same, other = Small(), data(5), data(5)
    other = other[0] * torch.tensor([5.0, 0.1, 1, 1, 9])[:, None, None, None], other[1]
    own, away = rows(model, same)[0], rows(model, other)[0]
    stored, fresh = (smw_coefficients(u.T @ u, alpha=1e-4) for u in (matrix(own, "inner"), matrix(away, "inner")))
    cosine = F.cosine_similarity(stored, fresh, dim=0).item()
    assert cosine < 1 - 1e-6

    def epochs(threshold: float) -> list[bool]:
        """Whether each epoch used fresh coefficients, of batches same, same, other, other, other."""
        net = copy.deepcopy(model)
        opt = FNGD(net, lr=0.0, alpha=1e-4, steps_per_epoch=1, refresh_cosine=threshold, probe_layer="inner")
        result = []
        for batch in (same, same, other, other, other):
            got = vector(backward(net, batch), "inner")
            u = matrix(own if batch is same else away, "inner")
            (copied := FNGD(Small(), lr=0.0, steps_per_epoch=1, refresh_cosine=threshold)).load_state_dict(
                opt.state_dict()
            )
            assert copied._table.computing == opt._table.computing
            d = u @ (smw_coefficients(u.T @ u, alpha=1e-4))
            result.append(bool((got - d).norm() < 1e-8 * d.norm()))
            if not result[-1]:
                close(got, u @ stored)
            opt.step()
        return result

    assert epochs(cosine + 1e-7) == [True, True, False, True, True]
    assert epochs(cosine - 1e-7) == [True, True, False, False, False]


@pytest.mark.parametrize("gram", ["layer", "network"])
def test_diagnostics(gram: str) -> None:
    model, batch, alpha = Small(), data(6), 1e-3
    own, _ = rows(model, batch)
    opt = FNGD(model, lr=0.0, alpha=alpha, steps_per_epoch=1, diagnostics=True, gram=gram)
    got = backward(model, batch)
    figures = opt.diagnostics
    assert list(figures) == (list(LAYERS) if gram == "network" else list(LAYERS)[::-1])
    total = sum(vector(got, layer).square().sum() for layer in LAYERS)
    for layer in LAYERS:
        u = matrix(own, *(LAYERS if gram == "network" else (layer,)))
        gram_matrix = u.T @ u
        factors = 6 * smw_coefficients(gram_matrix, alpha=alpha)
        d, g = vector(got, layer), matrix(own, layer).mean(1)
        expected = {
            "damping": alpha * gram_matrix.norm(),
            "effective_rank": gram_matrix.trace() ** 2 / gram_matrix.square().sum(),
            "mean": factors.mean(),
            "spread": factors.std(correction=0),
            "cosine": F.cosine_similarity(d, g, dim=0),
            "share": d.square().sum() / total,
        }
        assert set(figures[layer]) == set(expected)
        for name, value in expected.items():
            close(figures[layer][name], value)
    opt.step()
    backward(model, batch)
    for name in ("mean", "spread", "cosine", "share", "damping"):  # stored coefficients: the same here
        close(opt.diagnostics["inner"][name], figures["inner"][name])
    plain = NGD(Small(), lr=0.0)
    with pytest.raises(ValueError, match="construct the optimiser with diagnostics=True"):
        _ = plain.diagnostics


def test_effective_rank() -> None:
    u = torch.randn(9, 1)
    assert effective_rank(u @ u.T).item() == pytest.approx(1)
    assert effective_rank(3e-9 * torch.eye(5)).item() == pytest.approx(5)
    assert effective_rank(torch.zeros(4, 4)).item() == 0


@pytest.mark.parametrize("gram", ["layer", "network"])
def test_groups_that_are_not_preconditioned(gram: str) -> None:
    model, batch = Small(), data(5)
    own, _ = rows(model, batch)
    rest = [*model.conv.parameters(), *model.inner.parameters(), *model.norm.parameters()]
    opt = NGD(model, [{"params": rest}], lr=0.1, alpha=1e-3, gram=gram)
    opt.add_param_group({"params": model.head.parameters(), "precondition": False})
    opt.load_state_dict(opt.state_dict())  # makes new groups
    got = backward(model, batch)
    close(vector(got, "head"), matrix(own, "head").mean(1))
    for layers in [("conv", "inner")] if gram == "network" else [("conv",), ("inner",)]:
        close(vector(got, *layers), dense(matrix(own, *layers), 1e-3))


def test_joint_policies_see_every_layer_once() -> None:
    model, (x, _) = Small(), data(4)
    asked: list[list[str]] = []

    def policy(grads: dict[str, persample.LayerGrads]) -> dict[str, Any]:
        asked.append(list(grads))
        return {"inner": torch.zeros(4), "head": tuple(2 * part if part is not None else None for part in plain)}

    model(x).sin().sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    plain = (before["head.weight"], None)
    model.zero_grad()
    with persample.reweight(model, policy, joint=True) as handle:
        model(x).sin().sum().backward()
        with pytest.raises(ValueError, match="no backward pass is asking"):
            handle.joined(lambda tensor, axis: tensor)
    assert asked == [["conv", "inner", "head"]]
    for name, p in model.named_parameters():
        factor = {"inner": 0.0, "head": 2.0}.get(name.split(".")[0], 1.0)
        torch.testing.assert_close(p.grad, factor * before[name])


def test_joint_gates_pass_over_layers_that_did_not_run() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(self.a(x)).detach() + self.a(x))

    model = Branches()
    opt = NGD(model, lr=0.1, gram="network")
    model(torch.randn(5, 3)).square().mean().backward()
    assert model.b.weight.grad is None
    assert model.a.weight.grad is not None
    opt.step()
    with torch.no_grad():
        model(torch.randn(5, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "x"}, r"fisher='x' is unknown; choose one of \['empirical', 'improved', 'true'\]"),
        ({"fisher": "true"}, r"no coefficients to share. Use fngd.NGD, or share=None"),
        ({"accumulate": "x"}, r"accumulate='x' is unknown; choose one of \['separate', 'joint'\]"),
        ({"accumulate": "joint", "refresh_cosine": 0.5}, "compares the coefficients of single backward passes"),
        ({"gram": "global", "accumulate": "joint"}, "neither fisher='true' nor accumulate='joint'"),
        ({"gram": "global", "fisher": "true", "share": None}, "neither fisher='true' nor accumulate='joint'"),
        ({"gram": "global", "adapt_damping": AdaptiveDamping()}, "adapt_damping does not go with gram='global'"),
        ({"other": "x"}, r"other='x' is unknown; choose one of \['sgd', 'adamw'\]"),
        ({"scale": "x"}, r"scale='x' is unknown; choose one of \['absorb', 'per_layer', 'graft'\]"),
        ({"gram": "x"}, r"gram='x' is unknown; choose one of \['layer', 'network', 'global'\]"),
        ({"kl_clip": 0.0}, "kl_clip=0.0; it must be > 0"),
        ({"gram": "global", "scale": "graft"}, "neither kl_clip nor scale='graft'"),
        ({"refresh_cosine": 1.5}, r"refresh_cosine=1.5; .* must be in \(0, 1\]"),
        ({"probe_layer": "inner"}, "needs refresh_cosine="),
        ({"share": None, "refresh_cosine": 0.5}, "need share="),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    model = Small()
    with pytest.raises(ValueError, match=message):
        FNGD(model, **{"steps_per_epoch": None if "share" in options else 1, **options})
    assert not model.conv._forward_hooks


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, x: model.head(model.inner(x.mean((2, 3)) @ torch.ones(2, 3))), "but none was seen"),
        (lambda model, x: model(x).T, r"8 samples on axis 1, but it has shape \[8, 3\]"),
    ],
)
def test_outputs_that_cannot_be_read(call: Callable[[Small, Tensor], Tensor], message: str) -> None:
    model, (x, _) = Small(), data(8)
    axis = 1 if "axis 1" in message else 0
    opt = NGD(model, lr=0.1, fisher="improved", output_axis=axis, batch_axis=None if axis else {"head": 0, "inner": 0})
    with pytest.raises(ValueError, match=message):
        call(model, x).square().sum().backward()
    opt.remove()


def test_the_kl_clip_sees_unscaled_gradients() -> None:
    first, batch = Small(), data(5)
    second = copy.deepcopy(first)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = NGD(first, lr=0.1, kl_clip=1e-6)
    backward(first, batch)
    plain.step()
    opt = NGD(second, lr=0.1, kl_clip=1e-6, scaler=scaler)
    scaler.scale(F.cross_entropy(second(batch[0]), batch[1])).backward()
    scaler.step(opt)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
