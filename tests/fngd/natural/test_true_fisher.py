"""NGD with the true Fisher matrix: labels drawn from the model, against dense matrices of the same labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import reloaded
from hypothesis import given
from hypothesis import strategies as st
from natural import LAYERS, Small, blocks, close, cross_entropies, data, dense, grads_of, matrix, rows, vector
from torch import Tensor, nn
from torch.nn import functional as F

from fngd import NGD
from fngd.natural.solve.directions import inner_products
from fngd.natural.true_fisher.likelihoods import sampled_losses
from persample.reweighting import LayerGrads

pytestmark = pytest.mark.usefixtures("double")


def drawn_by(seed: int, likelihood: Any = "categorical") -> Callable[[Tensor], Tensor]:
    """−log p of the labels that an optimiser with this seed draws first."""
    return lambda outputs: sampled_losses(outputs, likelihood, generator=torch.Generator().manual_seed(seed))


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(2, 4)),
    seed=st.integers(0, 10**6),
    log_alpha=st.floats(-3, 0.5),
    scale=st.sampled_from(["absorb", "per_layer", "graft"]),
    gram=st.sampled_from(["layer", "network"]),
    reduction=st.sampled_from(["mean", "sum"]),
    likelihood=st.sampled_from(["categorical", "bernoulli", "gaussian"]),
    absolute=st.booleans(),
    scaled=st.booleans(),
)
def test_directions_equal_dense_matrices(
    shape: tuple[int, int, int, int],
    seed: int,
    log_alpha: float,
    scale: str,
    gram: str,
    reduction: str,
    likelihood: str,
    absolute: bool,
    scaled: bool,
) -> None:
    size, channels, width, classes = shape
    torch.manual_seed(seed)
    model, (x, y) = Small(channels, width, classes), data(size, channels, classes)
    own, sampled = rows(model, x, cross_entropies(y)), rows(model, x, drawn_by(seed, likelihood))
    damping = {"alpha": None, "damping": 0.1} if absolute else {"alpha": 10**log_alpha}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    times = 1.0 if scaler is None else scaler.scale(torch.ones(())).item()
    opt = NGD(
        model, lr=0.0, scale=scale, gram=gram, reduction=reduction, fisher="true", seed=seed, scaler=scaler, **damping
    )
    outputs = model(x)
    opt.sample(outputs, likelihood)
    assert all(p.grad is None for p in model.parameters()), "sampling leaves .grad alone"
    (times * F.cross_entropy(outputs, y, reduction=reduction)).backward()
    got = grads_of(model)
    times *= size if reduction == "sum" else 1
    for layers in blocks(gram):
        v, g = matrix(sampled, *layers), matrix(own, *layers).mean(1)
        lam = 0.1 if absolute else 10**log_alpha * (v.T @ v).norm()
        if v.norm() > 1e-9 and g.norm() > 1e-9:
            close(vector(got, *layers) / times, dense(v, g, lam=lam, scale=scale))
    close(vector(got, "norm") / times, matrix(own, "norm").mean(1))
    opt.remove()


def test_labels_are_drawn_anew_for_every_forward_pass_and_state_goes_on() -> None:
    model, (x, y) = Small(), data(4)

    def directions(opt: NGD, count: int) -> list[Tensor]:
        result = []
        for _ in range(count):
            outputs = opt._model(x)
            opt.sample(outputs)
            F.cross_entropy(outputs, y).backward()
            result.append(vector(grads_of(opt._model), *LAYERS))
            opt.step()
            opt.zero_grad()
        return result

    other = copy.deepcopy(model)
    opt = NGD(model, lr=0.0, fisher="true", alpha=1e-3)
    first = directions(opt, 2)
    assert not torch.allclose(*first)
    saved = reloaded(opt.state_dict())
    again = NGD(other, lr=0.0, fisher="true", alpha=1e-3, seed=9)
    again.load_state_dict(saved)
    assert torch.equal(directions(opt, 1)[0], directions(again, 1)[0])


def test_the_average_over_draws_is_the_fisher_matrix_of_the_softmax() -> None:
    """E[zzᵀ] = diag(p) − ppᵀ, and for the others the known variances."""
    logits = torch.tensor([[0.3, -1.0, 1.2]]).repeat(200_000, 1).requires_grad_()
    p = logits[0].detach().softmax(0)
    bernoulli = logits[0].detach().sigmoid()
    expected = {
        "categorical": torch.diag(p) - p[:, None] * p,
        "bernoulli": torch.diag(bernoulli * (1 - bernoulli)),
        "gaussian": torch.eye(3),
    }
    for likelihood, fisher in expected.items():
        losses = sampled_losses(logits, likelihood, generator=torch.Generator().manual_seed(0))
        (z,) = torch.autograd.grad(losses.sum(), logits)
        torch.testing.assert_close(z.T @ z / len(z), fisher, rtol=0, atol=0.02)
        assert z.mean(0).abs().max() < 0.02


@pytest.mark.parametrize(
    ("shape", "axis", "class_axis"),
    [((5, 3), 0, None), ((3, 5), 1, None), ((5, 3, 2), 0, 1), ((5, 2, 3), 0, -1), ((2, 5, 3), 1, 2), ((3, 2, 5), 2, 0)],
)
def test_axes_of_samples_and_classes(shape: tuple[int, ...], axis: int, class_axis: int | None) -> None:
    logits = torch.randn(shape)
    losses = sampled_losses(logits, axis=axis, class_axis=class_axis, generator=torch.Generator().manual_seed(3))
    assert losses.shape == (5,)
    # The labels by brute force: the same losses arise from one label at every position.
    classes = 1 - axis if class_axis is None else class_axis % len(shape)
    by_class = -logits.log_softmax(classes).movedim((axis, classes), (0, -1)).reshape(5, -1, 3)
    sums = by_class[:, 0]
    for position in range(1, by_class.shape[1]):
        sums = (sums[:, :, None] + by_class[:, position, None, :]).flatten(1)
    assert (sums - losses[:, None]).abs().amin(1).max() < 1e-12


def test_functions_as_likelihoods() -> None:
    model, (x, y) = Small(), data(5)
    labels = torch.tensor([0, 2, 1, 1, 0])
    opt = NGD(model, lr=0.0, alpha=1e-2, fisher="true")
    outputs = model(x)
    opt.sample(outputs, cross_entropies(labels))
    F.cross_entropy(outputs, y).backward()
    v, g = (matrix(rows(model, x, cross_entropies(each)), "inner") for each in (labels, y))
    close(vector(grads_of(model), "inner"), dense(v, g.mean(1), lam=1e-2 * (v.T @ v).norm()))
    with pytest.raises(ValueError, match=r"returned shape \[\]; it must be one −log p per sample, \[5\]"):
        opt.sample(model(x), lambda outputs: outputs.sum())


def test_kl_clip_and_diagnostics() -> None:
    model, (x, y) = Small(), data(5)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    own, sampled = rows(model, x, cross_entropies(y)), rows(model, x, drawn_by(0))
    opt = NGD(model, lr=0.3, momentum=0.0, alpha=1e-2, fisher="true", kl_clip=1e-6, diagnostics=True)
    outputs = model(x)
    opt.sample(outputs)
    F.cross_entropy(outputs, y).backward()
    opt.step()
    directions, total = {}, 0.0
    for layer in LAYERS:
        v, g = matrix(sampled, layer), matrix(own, layer).mean(1)
        gram = v.T @ v
        directions[layer] = dense(v, g, lam=1e-2 * gram.norm())
        total += 0.09 * (directions[layer] @ g).item()
        figures = opt.diagnostics[layer]
        assert set(figures) == {"damping", "effective_rank", "cosine", "share"}
        close(figures["damping"], 1e-2 * gram.norm())
        close(figures["cosine"], F.cosine_similarity(directions[layer], g, dim=0))
    moved = {name: start[name] - p.detach() for name, p in model.named_parameters()}
    for layer in LAYERS:
        close(vector(moved, layer), 0.3 * math.sqrt(1e-6 / total) * directions[layer])


@pytest.mark.parametrize("kind", ["linear", "conv", "transposed", "twice"])
def test_inner_products(kind: str) -> None:
    """⟨g_b, v⟩ against the rows, for layers of which autograd must transpose each weighted sum."""
    layer: Any = {
        "linear": lambda: nn.Linear(3, 4),
        "conv": lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
        "transposed": lambda: nn.ConvTranspose1d(3, 2, 3, stride=2),
        "twice": lambda: nn.Conv1d(2, 2, 3, padding=1),
    }[kind]()
    size = {"linear": (5, 2, 3), "conv": (5, 4, 7, 7), "transposed": (5, 3, 4), "twice": (5, 2, 6)}[kind]
    uses = []
    for _ in range(2 if kind == "twice" else 1):
        x = torch.randn(size)
        uses.append((x, torch.randn_like(layer(x))))
    grads = LayerGrads(layer, uses, [True, layer.bias is not None], 0)
    vectors = torch.randn_like(layer.weight), None if layer.bias is None else torch.randn_like(layer.bias)
    expected = []
    for b in range(5):
        total = sum((layer(x[b : b + 1]) * z[b : b + 1]).sum() for x, z in uses)
        own = torch.autograd.grad(total, list(layer.parameters()))
        expected.append(sum((g * v).sum() for g, v in zip(own, (v for v in vectors if v is not None), strict=True)))
    close(inner_products(grads, vectors), torch.stack(expected))


def test_samples_that_are_not_finite_give_the_plain_gradient() -> None:
    model, (x, y) = Small(), data(4)
    opt = NGD(model, lr=0.0, fisher="true")
    outputs = model(x)
    opt.sample(outputs, lambda outputs: outputs.sum(1) * torch.tensor([1.0, math.inf, 1.0, 1.0]))
    F.cross_entropy(outputs, y).backward()
    own = rows(model, x, cross_entropies(y))
    close(vector(grads_of(model), *LAYERS), matrix(own, *LAYERS).mean(1))


def test_misuse() -> None:
    model, (x, y) = Small(), data(4)
    empirical = NGD(model, lr=0.0)
    with pytest.raises(ValueError, match="is for fisher='true', but fisher is 'empirical'"):
        empirical.sample(model(x))
    empirical.remove()
    opt = NGD(model, lr=0.0, fisher="true")
    with pytest.raises(ValueError, match=r"no gradients of sampled labels for layers \['head'\]. Call opt.sample"):
        F.cross_entropy(model(x), y).backward()
    opt.zero_grad()
    opt.sample(model(x[:3]))
    with pytest.raises(ValueError, match=r"drew are for batches of \[3\] samples, but the backward passes had \[4\]"):
        F.cross_entropy(model(x), y).backward()
    with torch.no_grad(), pytest.raises(ValueError, match="not one without a graph"):
        opt.sample(model(x))
    with pytest.raises(Exception, match=r"sample needs the tensor that the model returned|violates type hint"):
        opt.sample((model(x),))
    opt.zero_grad()
    outputs = model(x)
    for message, options in {
        r"likelihood='x' is unknown; choose one of \['categorical', 'bernoulli', 'gaussian'\]": {"likelihood": "x"},
        "is for likelihood='categorical', not 'gaussian'": {"likelihood": "gaussian", "class_axis": 1},
        "class_axis=0 is no axis of classes": {"class_axis": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            opt.sample(outputs, **options)
    with pytest.raises(ValueError, match="have several axes that could count classes; give class_axis="):
        sampled_losses(torch.zeros(2, 3, 4))
