"""The options of NGD and FNGD against matrices that are built sample by sample, in float64 to 1e-8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from natural import LAYERS, close, data, matrix, vector
from torch import Tensor
from torch.nn import functional as F
from variants import Small, backward, dense, rows

from fngd import FNGD, NGD, smw_coefficients
from fngd.natural.adaptive_damping import AdaptiveDamping

pytestmark = pytest.mark.usefixtures("double")


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
    with pytest.raises(Exception, match=r"rhs has shape \[5\]; with this gram it must be \[4\]|violates type hint"):
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
