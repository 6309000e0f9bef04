"""The KL clip: ν is that of its formula and of explicitly built vectors, with the rate of the very step."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from natural import LAYERS, close, data, matrix, vector
from preconditioned import Net, batch
from torch.nn import functional as F
from variants import Small, backward, dense, rows

from fngd import KFAC, NGD
from fngd.optim.kl_clip import kl_clip_bound, kl_clip_factor


@given(rates=st.lists(st.floats(1e-3, 10), min_size=1, max_size=4), kappa=st.floats(1e-6, 1e3))
def test_kl_clip_formula(rates: list[float], kappa: float) -> None:
    inner = [torch.tensor(float(n + 1), dtype=torch.float64) for n in range(len(rates))]
    total = sum(rate**2 * (n + 1) for n, rate in enumerate(rates))
    assert kl_clip_factor(inner, rates, kappa).item() == pytest.approx(min(1, math.sqrt(kappa / total)))


def test_kl_clip_of_nothing_is_one() -> None:
    assert kl_clip_factor([torch.zeros(())], [0.1], 1e-3).item() == 1
    assert kl_clip_factor([torch.ones(())], [0.0], 1e-3).item() == 1


@pytest.mark.usefixtures("double")
def test_schedule_changes_the_clip() -> None:
    """Two groups with rates of their own; the length of the step follows the rate of this very step."""
    model = Net()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    groups = [
        {"params": [*model.conv.parameters(), *model.norm.parameters(), model.scale], "lr": 0.5},
        {"params": [*model.inner.parameters(), *model.head.parameters()], "lr": 0.2},
    ]
    opt = KFAC(model, groups, momentum=0.0, kl_clip=1e-5, damping=0.1)
    free = KFAC(copy := Net(), lr=1.0, momentum=0.0, kl_clip=None, damping=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: (1.0, 0.1)[min(step, 1)])
    for factor in (1.0, 0.1):
        model.load_state_dict(start)
        copy.load_state_dict(start)
        for net, optimizer in ((model, opt), (copy, free)):
            x, y = batch(0)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        layers = ("conv", "inner", "head")
        rates = {name: factor * (0.5 if name.split(".")[0] in ("conv", "norm", "scale") else 0.2) for name in start}
        v = {name: start[name] - value for name, value in copy.state_dict().items()}
        total = sum(
            rates[n] ** 2 * (v[n] * p.grad).sum() for n, p in copy.named_parameters() if n.split(".")[0] in layers
        )
        nu = min(1.0, math.sqrt(1e-5 / total))
        assert nu < 1
        for name, value in model.state_dict().items():
            clipped = nu if name.split(".")[0] in layers else 1.0
            close(start[name] - value, rates[name] * clipped * v[name], 1e-9)
        scheduler.step()


@pytest.mark.usefixtures("double")
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


@pytest.mark.usefixtures("double")
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


@pytest.mark.usefixtures("double")
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
