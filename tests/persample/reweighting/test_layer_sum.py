"""Σ_b c_b g_b straight from x and z: kept memory that nothing aliases, pieces of a batch, factors with gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from persample.blocks.convolution import gradients as convolution
from persample.memory import workspace
from persample.reweighting import LayerGrads, reweight
from persample.reweighting.weighted_sum import layer_sum

pytestmark = pytest.mark.usefixtures("double")
CONVOLUTIONS = {
    (False, 1): nn.Conv1d, (False, 2): nn.Conv2d, (False, 3): nn.Conv3d,
    (True, 1): nn.ConvTranspose1d, (True, 2): nn.ConvTranspose2d, (True, 3): nn.ConvTranspose3d,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    workspace._kept.memory.clear()
    workspace._kept.views.clear()


def by_samples(module: nn.Module, x: Tensor, z: Tensor, c: Tensor, axis: int = 0) -> list[Tensor]:
    """Σ_b c_b g_b with g_b from a forward and a backward pass of sample b alone."""
    totals = [torch.zeros_like(parameter) for parameter in module.parameters()]
    for b in range(x.shape[axis]):
        output = module(x.narrow(axis, b, 1))
        grads = torch.autograd.grad(output, list(module.parameters()), z.narrow(axis, b, 1))
        totals = [total + c[b] * grad for total, grad in zip(totals, grads, strict=True)]
    return totals


def one_sum(module: nn.Module, x: Tensor, z: Tensor, c: Tensor | None, axis: int = 0) -> list[Tensor]:
    needed = True, module.bias is not None
    return [part for part in layer_sum(module, [(x, z)], needed, axis, c) if part is not None]


def same(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    assert len(got) == len(expected)
    for part, value in zip(got, expected, strict=True):
        torch.testing.assert_close(part, value, rtol=tolerance, atol=tolerance)


# --- pieces ---------------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A convolution of any kind with x, z in any memory format, and factors."""
    transposed, dims = draw(st.booleans()), draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    inp, out, batch = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3)), draw(st.integers(1, 11))
    sizes = st.lists(st.integers(1, 3), min_size=dims, max_size=dims).map(tuple)
    kernel, stride, dilation = draw(sizes), draw(sizes), draw(sizes)
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    mode = "zeros"
    if transposed:
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        options["padding"] = tuple(draw(st.integers(0, 1)) for _ in range(dims))
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
        options["padding"] = tuple(draw(st.integers(0, 2)) for _ in range(dims))
        if max(stride) == 1 and draw(st.booleans()):
            options["padding"] = "same"
        options["padding_mode"] = mode
    torch.manual_seed(draw(st.integers(0, 2**16)))
    module = CONVOLUTIONS[transposed, dims](inp, out, kernel, **options)
    space = [d * (k - 1) + 3 + draw(st.integers(0, 2)) for k, d in zip(kernel, dilation, strict=True)]
    x = torch.randn(batch, inp, *space)
    if dims == 2 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    z = torch.randn_like(module(x).detach())
    if draw(st.booleans()):
        z = torch.randn(()).expand_as(z)  # as of loss.sum()
    elif draw(st.booleans()):
        z = torch.randn(*reversed(z.shape)).permute(*reversed(range(z.dim())))
    return module, x, z, torch.randn(batch)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")  # says how torch pads
@given(case=convolutions(), piece=st.integers(1, 2000))
def test_pieces_of_a_batch(case: tuple[nn.Module, Tensor, Tensor, Tensor], piece: int) -> None:
    module, x, z, c = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "PIECE", piece)
        patch.setattr(workspace, "SMALLEST", 1)
        same(one_sum(module, x, z, c), by_samples(module, x, z, c))
        same(one_sum(module, x, z, None), by_samples(module, x, z, torch.ones_like(c)))


@pytest.mark.parametrize("batch", [1, 7, 8, 13])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_pieces_are_really_used(batch: int, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = CONVOLUTIONS[transposed, 2](2, 2, 2)
    x, c, parts = torch.randn(batch, 2, 20, 20), torch.randn(batch), []
    z = torch.randn_like(module(x).detach())
    original = convolution.weight_gradient
    monkeypatch.setattr(convolution, "PIECE", max(4096, x.nbytes // 5))
    monkeypatch.setattr(convolution, "weight_gradient", lambda x, z, spec: parts.append(len(x)) or original(x, z, spec))
    same(one_sum(module, x, z, c), by_samples(module, x, z, c))
    assert sum(parts) == batch
    assert len(parts) > 1 or batch == 1
    assert batch != 13 or len(set(parts)) == 2, "the last is smaller"


# --- kept memory ----------------------------------------------------------------------------------------------

LARGE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear, z scaled": (lambda: nn.Linear(96, 64), (300, 96), 0),
    "linear, x scaled": (lambda: nn.Linear(64, 96), (300, 64), 0),
    "linear, no bias": (lambda: nn.Linear(64, 96, bias=False), (300, 64), 0),
    "linear, time first": (lambda: nn.Linear(64, 48), (5, 70, 64), 1),
    "linear, samples inside": (lambda: nn.Linear(48, 64), (3, 50, 4, 48), 1),
    "conv, z scaled": (lambda: nn.Conv2d(8, 6, 3), (20, 8, 14, 14), 0),
    "conv, x scaled": (lambda: nn.Conv2d(4, 9, 3, bias=False), (40, 4, 14, 14), 0),
    "transposed": (lambda: nn.ConvTranspose1d(6, 5, 3, stride=2, output_padding=1), (40, 6, 80), 0),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_layers(name: str) -> None:
    build, shape, axis = LARGE[name]
    module, x = build(), torch.randn(shape)
    z, c = torch.randn_like(module(x).detach()), torch.randn(shape[axis])
    expected = by_samples(module, x, z, c, axis)
    same(one_sum(module, x, z, c, axis), expected)
    assert workspace._kept.memory, "memory is kept for layers of this size"
    same(one_sum(module, x, z, 2 * c, axis), [2 * part for part in expected])
    strided = torch.stack([c, c], 1)[:, 0]
    same(one_sum(module, x, z, strided, axis), expected)
    same(one_sum(module, x, z, c.float().double().float(), axis), by_samples(module, x, z, c.float(), axis))
    same(one_sum(module, x, z[..., :1].expand_as(z), c, axis), by_samples(module, x, z[..., :1].expand_as(z), c, axis))


def storages(parts: Any) -> set[int]:
    return {part.untyped_storage().data_ptr() for part in parts if part is not None}


def test_results_are_in_memory_of_their_own() -> None:
    """Gradients of two layers, kept over later sums, neither change nor share memory with what is kept."""
    results, copies = [], []
    for seed, (build, shape, axis) in product(range(2), LARGE.values()):
        torch.manual_seed(seed)
        module, x = build(), torch.randn(shape)
        z, c = torch.randn_like(module(x).detach()), torch.randn(shape[axis])
        results.append(one_sum(module, x, z, c, axis))
        copies.append([part.clone() for part in results[-1]])
    kept = storages(workspace._kept.memory.values())
    everything = [part for parts in results for part in parts]
    assert not kept & storages(everything)
    assert len(storages(everything)) == len(everything)
    for parts, copied in zip(results, copies, strict=True):
        assert all(torch.equal(part, other) for part, other in zip(parts, copied, strict=True))


def large_model(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(864, 32), nn.Linear(32, 4))
    return model, torch.randn(32, 3, 14, 14), torch.rand(32)


def train(seed: int, steps: int = 6) -> list[Tensor]:
    model, x, c = large_model(seed)
    opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.5)
    with reweight(model, lambda layer, grads: c):
        for _ in range(steps):
            opt.zero_grad()
            model(x).sin().sum().backward()
            opt.step()
    return [parameter.detach() for parameter in model.parameters()]


def test_threads_have_memory_of_their_own() -> None:
    """Two models trained in two threads at once come out as one after the other."""
    seeds = (1, 2)
    models = [large_model(seed) for seed in seeds]  # seeds are global, so models are made before
    expected = [train(seed) for seed in seeds]
    found: dict[int, list[Tensor]] = {}
    ready = threading.Barrier(len(seeds))

    def run(place: int) -> None:
        torch.set_num_threads(1)
        model, x, c = models[place]
        opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.5)
        ready.wait()
        with reweight(model, lambda layer, grads: c):
            for _ in range(6):
                opt.zero_grad()
                model(x).sin().sum().backward()
                opt.step()
        found[place] = [parameter.detach() for parameter in model.parameters()]

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(seeds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, parameters in enumerate(expected):
        for got, value in zip(found[place], parameters, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-14)


def test_nothing_grows_over_many_steps() -> None:
    sizes = set()
    for step in range(200):
        build, shape, axis = list(LARGE.values())[step % len(LARGE)]
        if step < len(LARGE):
            module, x = build(), torch.randn(shape)
            z, c = torch.randn_like(module(x).detach()), torch.randn(shape[axis])
            cases = [*(cases if step else []), (module, x, z, c, axis)]
        module, x, z, c, axis = cases[step % len(LARGE)]
        one_sum(module, x, z, c, axis)
        if step >= len(LARGE):
            sizes.add(tuple(memory.nbytes for memory in workspace._kept.memory.values()))
    assert len(sizes) == 1
    assert sum(sizes.pop()) <= workspace.LARGEST


def test_memory_made_in_inference_mode_is_not_kept() -> None:
    """A policy that runs in inference mode leaves nothing that a later sum could not write to."""
    model, x, c = large_model(0)

    @torch.inference_mode()
    def policy(layer: str, grads: LayerGrads) -> None:
        grads.weighted_sum(c)

    for use in (policy, lambda layer, grads: c):
        with reweight(model, use):
            model.zero_grad()
            model(x).sin().sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    other, x, c = large_model(0)
    with reweight(other, lambda layer, grads: c):
        other(x).sin().sum().backward()
    same([parameter.grad for parameter in other.parameters()], expected)


# --- factors that are variables -------------------------------------------------------------------------------


def seen_of(model: nn.Module, x: Tensor) -> dict[str, LayerGrads]:
    seen: dict[str, LayerGrads] = {}
    with reweight(model, lambda layer, grads: seen.update({layer: grads})):
        model(x).sin().sum().backward()
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gram_first", [False, True])
@pytest.mark.parametrize("small_pieces", [False, True])
def test_a_sum_is_differentiable_by_its_factors(
    dtype: torch.dtype, gram_first: bool, small_pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """∂/∂c_b ½‖Σ_a c_a g_a‖² = Σ_a K_ab c_a, for layers so large that kept memory and oneDNN would be used."""
    if small_pieces:
        monkeypatch.setattr(convolution, "PIECE", 2**15)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(864, 128)).to(dtype)
    seen = seen_of(model, torch.randn(40, 3, 14, 14, dtype=dtype))
    assert set(seen) == {"0", "2"}
    for grads in seen.values():
        gram = grads.gram() if gram_first else None
        c = torch.randn(40, dtype=dtype, requires_grad=True)
        weight, bias = grads.weighted_sum(c)
        (got,) = torch.autograd.grad((weight.square().sum() + bias.square().sum()) / 2, c)
        expected = (grads.gram() if gram is None else gram) @ c.detach()
        torch.testing.assert_close(got, expected, rtol=1e-9 if dtype == torch.float64 else 2e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")  # torch.func.jvp warns of what torch itself calls
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_function_transforms_of_the_factors(dtype: torch.dtype) -> None:
    model, many = nn.Sequential(nn.Linear(128, 192)).to(dtype), torch.randn(3, 160, dtype=dtype)
    [grads] = seen_of(model, torch.randn(160, 128, dtype=dtype)).values()
    expected = torch.stack([grads.weighted_sum(c)[0] for c in many])
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(torch.vmap(lambda c: grads.weighted_sum(c)[0])(many), expected, **tolerance)
    _, tangent = torch.func.jvp(lambda c: grads.weighted_sum(c)[0], (many[0],), (many[1],))
    torch.testing.assert_close(tangent, expected[1], **tolerance)


def test_what_a_policy_saw_stays_as_it_was() -> None:
    """LayerGrads are lazy: asked later, after other sums and further backward passes, they say the same."""
    model, x, c = large_model(0)
    at_once: dict[str, Any] = {}

    def policy(layer: str, grads: LayerGrads) -> None:
        at_once[layer] = [part.clone() for part in (*grads.weighted_sum(c), grads.norms())]

    with reweight(model, policy):
        model(x).sin().sum().backward()
    later = seen_of(model, x)
    for _ in range(2):
        seen_of(model, x + 1)
    for layer, grads in later.items():
        same([*grads.weighted_sum(c), grads.norms()], at_once[layer])


# --- shapes at the edge -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "shape", "axis"),
    [
        (lambda: nn.Linear(3, 2), (0, 3), 0),
        (lambda: nn.Linear(3, 2), (5, 0, 3), 1),
        (lambda: nn.Linear(3, 2), (4, 0, 3), 0),
        (lambda: nn.Linear(3, 2), (1, 3), 0),
        (lambda: nn.Linear(3, 2), (7, 1, 3), 1),
        (lambda: nn.Linear(3, 2), (2, 5, 4, 3), 2),
        (lambda: nn.Conv1d(2, 3, 2), (0, 2, 4), 0),
        (lambda: nn.Conv2d(2, 3, 2), (1, 2, 4, 4), 0),
        (lambda: nn.ConvTranspose1d(2, 3, 2), (0, 2, 4), 0),
    ],
)
def test_empty_and_single(build: Callable[[], nn.Module], shape: tuple[int, ...], axis: int) -> None:
    module, x = build(), torch.randn(shape)
    z = torch.randn_like(module(x).detach())
    c = torch.randn(shape[axis])
    same(one_sum(module, x, z, c, axis), by_samples(module, x, z, c, axis))
    grads = LayerGrads(module, [(x, z)], (True, True), axis)
    assert grads.gram().shape == (len(c), len(c))
    assert grads.norms().shape == (len(c),)


def test_several_calls_and_a_function() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    calls = [(torch.randn(2, 5, 4), torch.randn(2, 5, 3)), (torch.randn(7, 5, 4), torch.randn(7, 5, 3))]
    c = torch.randn(5)
    total, bias = layer_sum(None, calls, (True, False), 1, c)
    assert bias is None
    expected = sum(
        torch.autograd.grad(F.linear(x[:, b], weight), weight, c[b] * z[:, b])[0] for x, z in calls for b in range(5)
    )
    torch.testing.assert_close(total, expected)


def test_a_geometry_that_changes_between_steps_is_seen() -> None:
    """Though all shapes stay the same; factors are given beforehand, so that the sum is a prepared one."""
    layer, x, c = nn.Conv2d(2, 3, 3, padding=1, bias=False).double(), torch.randn(4, 2, 6, 6).double(), torch.rand(4)
    handle = reweight(layer, lambda *_: pytest.fail("known= has answered"), known=lambda *_: c)
    for reach in (1, 2, 1):
        layer.padding = layer.dilation = (reach, reach)
        layer.zero_grad()
        layer(x).sin().sum().backward()
        weight = layer.weight.detach().requires_grad_()
        output = F.conv2d(x, weight, padding=reach, dilation=reach).sin().flatten(1).sum(1)
        (expected,) = torch.autograd.grad(output @ c.double(), weight)
        torch.testing.assert_close(layer.weight.grad, expected)
    handle.remove()
