"""reweight: rows that belong to samples, as windows, frames, views and flattened positions do, add up by sample."""

from __future__ import annotations

import pytest
import torch
from folding import Axial, Channels, Fold, Frames, Siamese, Swin, Tokens, Vit, assert_exact
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from persample import Folded

pytestmark = pytest.mark.usefixtures("double")

LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), (3,)),
    "linear, no bias": (lambda: nn.Linear(3, 4, bias=False), (3,)),
    "linear, positions": (lambda: nn.Linear(3, 4), (5, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2, stride=2, dilation=2), (2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2), (2, 3, 4)),
    "conv2d few positions": (lambda: nn.Conv2d(6, 7, 2), (6, 2, 2)),
    "conv2d one pixel": (lambda: nn.Conv2d(2, 3, 1), (2, 1, 2)),
    "conv2d reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 2, 3, 2)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (2, 3)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(2, 2, 2, groups=2), (2, 2, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("sizes", [(1, 3), (2, 1), (2, 2)], ids=["in sequence", "by turns", "both"])
def test_every_layer_type(name: str, sizes: tuple[int, int]) -> None:
    build, shape = LAYERS[name]
    before, after = sizes
    model = Fold(build(), before, after, shape)
    explained = assert_exact(model, torch.randn(4, before, after, *shape))
    consecutive = f"samples of {after} consecutive rows each" if after > 1 else "samples"
    times = f", {before} times one after another" if before > 1 else ""
    assert explained["layer"] == f"reweighted, {consecutive} on axis 0 of its output{times}"


@given(
    name=st.sampled_from(sorted(LAYERS)),
    batch=st.integers(1, 6),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    joint=st.booleans(),
    told=st.booleans(),
    seed=st.integers(0, 99),
)
def test_property(name: str, batch: int, before: int, after: int, joint: bool, told: bool, seed: int) -> None:
    torch.manual_seed(seed)
    build, shape = LAYERS[name]
    model = Fold(build(), before, after, shape)
    given = {"layer": Folded(before, after), "head": 0} if told else None
    assert_exact(model, torch.randn(batch, before, after, *shape), joint=joint, batch_axis=given)


@pytest.mark.parametrize("batch", [1, 2, 4, 5])
@pytest.mark.parametrize("size", [2, 4, 6])
def test_shifted_windows(batch: int, size: int) -> None:
    """Also with as many windows, and as many positions in one, as there are samples."""
    explained = assert_exact(Swin(), torch.randn(batch, 2, size, size))
    windows = size**2 // 4 * (1 if batch > 1 else batch)
    each = f"samples of {windows} consecutive rows each" if windows > 1 else "samples"
    assert explained["qkv.0"] == f"reweighted, {each} on axis 0 of its output"


@pytest.mark.parametrize("frames", [1, 3, 4])
def test_a_convolutional_network_on_frames(frames: int) -> None:
    assert_exact(Frames(), torch.randn(4, frames, 2, 4, 4))


@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("size", [(2, 3), (4, 4), (4, 8), (3, 4)])
def test_axial_attention(size: tuple[int, int], batch_first: bool) -> None:
    """Functions of torch's attention, [positions, B·lines, C] inside; also with 4 positions, as many as samples."""
    x, model = torch.randn(4, 4, *size), Axial(batch_first)
    groups = {path: [name for name, _ in model.named_parameters() if name.startswith(path)] for path in ("rows",)}
    assert groups
    assert_exact_functions(model, x)


def assert_exact_functions(model: nn.Module, x: torch.Tensor) -> None:
    from folding import factors_of, losses_of
    from oracle import loop_grads_of

    from persample import reweight

    rows = loop_grads_of(losses_of(model(x)), dict(model.named_parameters()))
    with reweight(model, lambda layer, grads: factors_of(grads.gram()), functions=True) as handle:
        losses_of(model(x)).sum().backward()
        explained = handle.explain()
        met = set()
        for path, why in explained.items():
            assert why.startswith("reweighted")
            names = [name for name, p in model.named_parameters() if any(p is own for own in handle.parameters(path))]
            whole = torch.cat([rows[name].flatten(1) for name in names], 1)
            for name in names:
                met.add(name)
                expected = torch.tensordot(factors_of(whole @ whole.T), rows[name], 1)
                torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=1e-8, atol=1e-10, msg=name)
        assert met == set(rows)


def test_views_of_two_inputs() -> None:
    explained = assert_exact(Siamese(), torch.randn(5, 1, 4), torch.randn(5, 1, 4))
    assert explained["conv"] == "reweighted, samples on axis 0 of its output, 2 times one after another"


def test_channels_apart() -> None:
    model, x = Channels(), torch.randn(4, 3, 8)
    assert_exact(model, x, plain=("",))


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("length", [1, 4, 6])
def test_positions_as_rows(length: int, time_first: bool) -> None:
    """Also with a start token, which is the same in all samples."""
    tokens = torch.randint(7, (4, length))
    if length > 1:
        tokens[:, 0] = 0
    assert_exact(Tokens(time_first), tokens, plain=("table",))


def test_a_class_token_folds_nothing() -> None:
    explained = assert_exact(Vit(), torch.randn(4, 1, 4, 4), plain=("",))
    assert set(explained.values()) == {"reweighted, samples on axis 0 of its output"}
