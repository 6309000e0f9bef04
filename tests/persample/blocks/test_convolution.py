"""Per-sample convolution gradients against the slow loop: autograd, one sample at a time, in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from persample import force_kernel
from persample.blocks.convolution.algorithms import ALGORITHMS, ordinary
from persample.blocks.convolution.gradients import ConvSpec, choose, gram, per_sample_grads, sqnorms, weighted_grad

FORWARD: dict[bool, tuple[Callable[..., Tensor], ...]] = {
    False: (F.conv1d, F.conv2d, F.conv3d),
    True: (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}


@dataclass(frozen=True)
class Case:
    x: Tensor
    z: Tensor
    spec: ConvSpec
    truth: Tensor  # [batch, *weight_shape]


def make_case(batch: int, spec: ConvSpec, space: tuple[int, ...], seed: int = 0, layout: str = "contiguous") -> Case:
    generator = torch.Generator().manual_seed(seed)
    inp = spec.weight_shape[0] if spec.transposed else spec.weight_shape[1] * spec.groups
    x = torch.randn(batch, inp, *space, dtype=torch.float64, generator=generator)
    weight = torch.zeros(spec.weight_shape, dtype=torch.float64, requires_grad=True)
    options = {name: getattr(spec, name) for name in ("stride", "padding", "dilation", "groups")}
    if spec.transposed:
        options["output_padding"] = spec.output_padding
    forward = FORWARD[spec.transposed][len(space) - 1]
    shape = forward(torch.zeros(1, *x.shape[1:], dtype=x.dtype), weight, **options).shape[1:]
    z = torch.randn(batch, *shape, dtype=torch.float64, generator=generator)
    truth = torch.zeros(batch, *spec.weight_shape, dtype=torch.float64)
    for b in range(batch):
        (truth[b],) = torch.autograd.grad(forward(x[b : b + 1], weight, **options), weight, z[b : b + 1])
    if layout == "channels_last":
        x, z = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, z))
    elif layout == "strided":
        x, z = (torch.stack([t, t], dim=-1)[..., 0] for t in (x, z))
    elif layout == "expanded":  # what the gradient of a sum looks like: every stride is zero
        z = torch.ones((), dtype=z.dtype).expand(z.shape)
        for b in range(batch):
            (truth[b],) = torch.autograd.grad(forward(x[b : b + 1], weight, **options), weight, z[b : b + 1])
    return Case(x, z, spec, truth)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dims = draw(st.integers(1, 3))

    def axes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel = draw(st.one_of(st.just((1,) * dims), st.just(axes(1, 3))))
    stride, dilation, transposed = axes(1, 3), axes(1, 3), draw(st.booleans())
    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    padding = draw(st.one_of(st.just((0,) * dims), st.just(axes(0, 2))))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    output_padding = (0,) * dims
    if transposed:
        output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        # at least one output position: (n - 1) s - 2 p + reach + output_padding ≥ 1
        low = [
            max(1, -(-(2 * p + 1 - r - extra) // s) + 1)
            for p, r, s, extra in zip(padding, reach, stride, output_padding, strict=True)
        ]
    else:
        low = [max(1, r - 2 * p) for r, p in zip(reach, padding, strict=True)]
    space = tuple(n + draw(st.integers(0, 3)) for n in low)
    spec = ConvSpec((*channels, *kernel), stride, padding, dilation, transposed, output_padding, groups)
    layout = draw(st.sampled_from(["contiguous", "channels_last", "strided", "expanded"]))
    return make_case(draw(st.integers(0, 4)), spec, space, draw(st.integers(0, 99)), layout)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert actual.shape == expected.shape
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * (scale + 1e-3))


@given(cases())
@settings(max_examples=80, deadline=None)
def test_every_algorithm_equals_the_loop(case: Case) -> None:
    _, _, spec = ordinary(case.x, case.z, case.spec)
    for name, algorithm in ALGORITHMS.items():
        if not algorithm.supports(spec):
            with pytest.raises(ValueError, match="fold"):
                per_sample_grads(case.x, case.z, case.spec, name)
            continue
        assert_close(per_sample_grads(case.x, case.z, case.spec, name), case.truth)
        with force_kernel(name):
            assert choose(case.x, case.z, case.spec) == name
            assert_close(per_sample_grads(case.x, case.z, case.spec), case.truth)
        for out in (torch.empty_like(case.truth), torch.empty(*case.truth.shape, 2).double()[..., 0]):
            assert per_sample_grads(case.x, case.z, case.spec, name, out) is out
            assert_close(out, case.truth)
    assert_close(per_sample_grads(case.x, case.z, case.spec), case.truth)


@given(cases(), st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_gram_and_norms_in_both_forms(case: Case, others: int) -> None:
    rows = case.truth.flatten(1)
    other = torch.cat([case.x] * 3)[:others], torch.cat([case.z] * 3)[:others]
    columns = torch.cat([rows, rows, rows])[:others]
    for form in ("materialise", "hadamard", None):
        with force_kernel(form or choose(case.x, case.z, case.spec)):
            assert_close(gram(case.x, case.z, case.spec), rows @ rows.T)
            assert_close(gram(case.x, case.z, case.spec, other), rows @ columns.T)
            assert_close(sqnorms(case.x, case.z, case.spec), rows.square().sum(1))


@given(cases(), st.booleans())
@settings(max_examples=50, deadline=None)
def test_weighted_grad(case: Case, weighted: bool) -> None:
    c = torch.linspace(-1, 2, len(case.truth), dtype=torch.float64) if weighted else None
    expected = case.truth.sum(0) if c is None else torch.einsum("b,b...->...", c, case.truth)
    before = case.x.clone(), case.z.clone()
    assert_close(weighted_grad(case.x, case.z, case.spec, c), expected)
    assert torch.equal(before[0], case.x)
    assert torch.equal(before[1], case.z)


CONV = ConvSpec((6, 2, 3, 3), (2, 1), (1, 1), (1, 1), False, (0, 0), 2)
TRANSPOSED = ConvSpec((4, 3, 3, 3), (2, 1), (1, 1), (1, 1), True, (1, 0), 2)


@pytest.mark.parametrize("spec", [CONV, TRANSPOSED])
@pytest.mark.parametrize("budget", [1, 1000, 3000])
@pytest.mark.parametrize("form", ["materialise", "hadamard"])
def test_a_small_memory_budget_changes_nothing(
    spec: ConvSpec, budget: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, second = make_case(5, spec, (5, 6)), make_case(3, spec, (5, 6), seed=1)
    monkeypatch.setattr("persample.blocks.convolution.gradients.BUDGET", budget)
    monkeypatch.setattr("persample.blocks.convolution.gradients.CACHE", budget)
    rows, columns = case.truth.flatten(1), second.truth.flatten(1)
    for name in ("fold", "rows", "unfold"):
        assert_close(per_sample_grads(case.x, case.z, spec, name), case.truth)
    with force_kernel(form):
        assert_close(gram(case.x, case.z, spec), rows @ rows.T)
        assert_close(gram(case.x, case.z, spec, (second.x, second.z)), rows @ columns.T)
        assert_close(sqnorms(case.x, case.z, spec), rows.square().sum(1))


@pytest.mark.parametrize("algorithm", ["fold", "rows", "unfold", "shift"])
def test_one_position_with_channels_last(algorithm: str) -> None:
    """Axes of one entry leave the order of memory open, and not every kernel takes every order."""
    spec = ConvSpec((4, 2, 3), (1,), (1,), (1,), True, (0,), 1)
    x, z = torch.randn(3, 1, 4, dtype=torch.float64).mT, torch.randn(3, 1, 2, dtype=torch.float64).mT
    want = per_sample_grads(x.contiguous().clone(), z.contiguous().clone(), spec, "loop")
    torch.testing.assert_close(per_sample_grads(x, z, spec, algorithm), want)


@pytest.mark.parametrize("spec", [CONV, TRANSPOSED])
def test_half_precision_is_accumulated_in_float32(spec: ConvSpec) -> None:
    case = make_case(3, spec, (7, 6))
    x, z = case.x.bfloat16(), case.z.bfloat16()
    truth = per_sample_grads(x.double(), z.double(), spec, "loop")
    results = {
        "grads": (per_sample_grads(x, z, spec), truth),
        "sum": (weighted_grad(x, z, spec), truth.sum(0)),
        "gram": (gram(x, z, spec), truth.flatten(1) @ truth.flatten(1).T),
        "norms": (sqnorms(x, z, spec), truth.flatten(1).square().sum(1)),
    }
    for actual, expected in results.values():
        assert actual.dtype == torch.float32
        assert_close(actual.double(), expected, 1e-5)


def test_unknown_names_are_refused() -> None:
    case = make_case(2, CONV, (5, 6))
    with pytest.raises(ValueError, match=r"'fft'.*fold.*unfold"), force_kernel("fft"):
        pass
    with pytest.raises(ValueError, match=r"'fft'.*fold.*unfold"):
        per_sample_grads(case.x, case.z, CONV, "fft")


@pytest.mark.parametrize(
    ("shape", "channels", "kernel", "stride", "groups"),
    [
        ((6, 3, 12, 12), 16, (3, 3), 1, 1),
        ((6, 16, 9, 9), 32, (3, 3), 2, 1),
        ((6, 16, 5, 5), 32, (1, 1), 2, 1),
        ((6, 16, 5, 5), 16, (3, 3), 1, 16),
        ((6, 3, 16, 16), 8, (4, 4), 4, 1),
        ((6, 8, 30), 8, (5,), 1, 2),
        ((2, 512, 3, 3), 512, (3, 3), 1, 1),
    ],
)
def test_float32_takes_other_kernels_and_agrees(
    shape: tuple[int, ...], channels: int, kernel: tuple[int, ...], stride: int, groups: int
) -> None:
    dims = len(kernel)
    padding = (0 if stride == 4 else kernel[0] // 2,) * dims
    weight_shape = (channels, shape[1] // groups, *kernel)
    spec = ConvSpec(weight_shape, (stride,) * dims, padding, (1,) * dims, False, (0,) * dims, groups)
    case = make_case(shape[0], spec, shape[2:])
    x, z, rows = case.x.float(), case.z.float(), case.truth.flatten(1)
    for name, algorithm in ALGORITHMS.items():
        if algorithm.supports(spec):
            assert_close(per_sample_grads(x, z, spec, name).double(), case.truth, 1e-5)
    for form in ("materialise", "hadamard"):
        with force_kernel(form):
            assert_close(gram(x, z, spec).double(), rows @ rows.T, 1e-5)
            assert_close(sqnorms(x, z, spec).double(), rows.square().sum(1), 1e-5)
