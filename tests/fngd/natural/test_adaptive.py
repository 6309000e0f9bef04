"""Adaptive damping: the prediction equals the dense quadratic model's, and the rule follows it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from checkpoints import reloaded
from hypothesis import given
from hypothesis import strategies as st
from natural import LAYERS, Small, blocks, clean, cross_entropies, data, matrix, rows, vector
from torch import Tensor
from torch.nn import functional as F

from fngd import FNGD, NGD
from fngd.natural.adaptive_damping import AdaptiveDamping

pytestmark = pytest.mark.usefixtures("double")


@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 6),
    log_alpha=st.floats(-3, 0),
    scale=st.sampled_from(["absorb", "per_layer", "graft"]),
    fisher=st.sampled_from(["empirical", "improved", "true"]),
    gram=st.sampled_from(["layer", "network"]),
    reduction=st.sampled_from(["mean", "sum"]),
    joint=st.booleans(),
    scaled=st.booleans(),
)
def test_the_ratio_is_that_of_the_dense_quadratic_model(
    seed: int,
    size: int,
    log_alpha: float,
    scale: str,
    fisher: str,
    gram: str,
    reduction: str,
    joint: bool,
    scaled: bool,
) -> None:
    torch.manual_seed(seed)
    model, (x, y) = Small(), data(size)
    labels, alpha = torch.randint(3, (size,)), 10**log_alpha
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    opt = NGD(
        model, lr=0.01, momentum=0.9, weight_decay=0.01, alpha=alpha, scale=scale, fisher=fisher, gram=gram,
        reduction=reduction, accumulate="joint" if joint else "separate", scaler=scaler, other="adamw",
        adapt_damping=AdaptiveDamping(every=2),
    )  # fmt: skip
    times = 1 if reduction == "sum" else 1 / size

    def loss(net: Small) -> Tensor:
        return F.cross_entropy(net(x), y, reduction=reduction)

    for step in range(3):  # momentum makes the steps other than the directions
        before, net = {name: p.detach().clone() for name, p in model.named_parameters()}, clean(model)
        for chosen in torch.arange(size).split((size + 1) // 2 if joint else size):
            outputs = model(x[chosen])
            if fisher == "true":
                opt.sample(outputs, cross_entropies(labels[chosen]))
            part = times * F.cross_entropy(outputs, y[chosen], reduction="sum")
            (part if scaler is None else scaler.scale(part)).backward()
        if scaler is None:
            opt.step()
        else:
            scaler.step(opt)
            scaler.update()
        assert opt.measuring == (step != 1)
        opt.zero_grad()
        if not opt.measuring:
            continue
        delta = {name: p.detach() - before[name] for name, p in model.named_parameters()}
        own = rows(net, x, cross_entropies(y))
        curved = rows(net, x, cross_entropies(labels)) if fisher == "true" else own
        predicted = vector(delta, "norm") @ matrix(own, "norm").mean(1)
        for layers in blocks(gram):
            d, v = vector(delta, *layers), matrix(curved, *layers)
            lam = opt.damping_factor * alpha * (v.T @ v).norm()
            predicted += d @ matrix(own, *layers).mean(1) + 0.5 * ((v.T @ d).square().mean() + lam * d @ d)
        predicted *= size if reduction == "sum" else 1
        first, second = loss(net), loss(clean(model))
        ratio = opt.adapt(first.detach(), second.detach())
        expected = ((second - first) / predicted).item()
        assert ratio == pytest.approx(expected, rel=1e-7)
    opt.remove()


def test_the_rule() -> None:
    rule = AdaptiveDamping(every=3, decay=0.5, smallest=0.1, largest=20.0)
    assert rule.updated(2.0, 0.76) == 0.25
    assert rule.updated(2.0, 0.24) == 16.0
    assert rule.updated(2.0, 0.5) == 2.0
    assert rule.updated(2.0, -1.0) == 16.0
    assert rule.updated(16.0, math.nan) == 20.0
    assert rule.updated(0.2, 1.0) == 0.1
    assert AdaptiveDamping().updated(1.0, 1.0) == pytest.approx((19 / 20) ** 5)


def test_damping_is_what_the_factor_says_and_is_saved() -> None:
    model, (x, y) = Small(), data(5)
    second = copy.deepcopy(model)
    opt = NGD(model, lr=0.0, momentum=0.0, adapt_damping=AdaptiveDamping(every=1, decay=0.5), alpha=1e-2)

    def gradient(net: Small, optimizer: NGD) -> Tensor:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        return vector({name: p.grad.clone() for name, p in net.named_parameters()}, *LAYERS)

    gradient(model, opt)
    opt.step()
    opt._predicted = torch.tensor(-1.0)  # a step of length 0 predicts nothing
    assert opt.adapt(2.0, 1.0) == 1
    assert opt.damping_factor == 0.5
    saved = reloaded(opt.state_dict())
    fixed = NGD(second, lr=0.0, alpha=5e-3)
    assert torch.equal(gradient(model, opt), gradient(second, fixed))
    fixed.remove()
    resumed = NGD(second, lr=0.0, alpha=1e-2, adapt_damping=AdaptiveDamping(every=1, decay=0.5))
    resumed.load_state_dict(saved)
    assert torch.equal(gradient(model, opt), gradient(second, resumed))
    opt.step()
    opt._predicted = torch.tensor(1.0)  # an increase was predicted
    opt.adapt(2.0, 1.0)
    assert opt.damping_factor == 0.5


def test_it_finds_a_damping_from_far_off_and_training_goes_on() -> None:
    """From a damping a thousand times too large the factor falls, and the loss falls faster than without."""
    losses = []
    for adaptive in (None, AdaptiveDamping(every=1, decay=0.7)):
        torch.manual_seed(0)
        model, (x, y) = Small(), data(16)
        opt = NGD(model, lr=1.0, momentum=0.0, damping=10.0, alpha=None, scale="per_layer", adapt_damping=adaptive)
        for _ in range(8):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            if opt.measuring:
                with torch.no_grad():
                    opt.adapt(loss, F.cross_entropy(model(x), y))
        losses.append(F.cross_entropy(model(x), y).item())
        assert opt.damping_factor == pytest.approx(1.0 if adaptive is None else 0.7**8)
    assert losses[1] < 0.95 * losses[0]


def test_fngd_adapts_where_it_computes() -> None:
    model = Small()
    opt = FNGD(model, lr=0.01, steps_per_epoch=2, refresh_epochs=2, adapt_damping=AdaptiveDamping(every=1))
    measured = []
    for _ in range(6):
        x, y = data(4)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        measured.append(opt.measuring)
        if opt.measuring:
            opt.adapt(loss, F.cross_entropy(model(x), y))
    assert measured == [True, True, False, False, True, True]


def test_misuse() -> None:
    model, (x, y) = Small(), data(4)
    opt: Any = NGD(model, lr=0.01, adapt_damping=AdaptiveDamping(every=1))
    with pytest.raises(ValueError, match="there is no prediction to compare with"):
        opt.adapt(1.0, 0.5)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(
        ValueError, match=r"this is the second since the last step. With gradient accumulation give acc"
    ):
        F.cross_entropy(model(x), y).backward()
    opt.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=r"adapt\(\) was not called after the step that was measured"):
        opt.step()
    with pytest.raises(ValueError, match=r"the training loss is a sum over the batch, but .* reduction='mean'"):
        opt.adapt(F.cross_entropy(model(x), y, reduction="sum"), 1.0)
    opt.adapt(loss, 0.1)
    opt.remove()
    for message, options in {
        "every=0; it must be a whole number": {"every": 0},
        r"decay=1.0; it must be in \(0, 1\)": {"decay": 1.0},
        "low must be less than high": {"low": 0.9},
        "smallest=2.0 and largest": {"smallest": 2.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            AdaptiveDamping(**options)
