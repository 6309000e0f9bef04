"""Sums over patches without patches: equal to the patches written out, over all geometries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fngd.kronecker import patches
from fngd.kronecker.patches import patch_moment, summed_patches


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """[batch, groups, inp, *kernel, *time] of an input, with any stride and dilation, as `LayerGrads.factors`."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    dims = draw(st.integers(1, 3))
    axes = [[draw(st.integers(1, 3)) for _ in range(4)] for _ in range(dims)]  # kernel, time, stride, dilation
    size = [(time - 1) * stride + (kernel - 1) * dilation + 1 for kernel, time, stride, dilation in axes]
    batch, groups, inp = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    x = torch.randn(batch, groups, inp, *size, dtype=torch.float64)
    steps = x.stride()[3:]
    return x.as_strided(
        (*x.shape[:3], *(axis[0] for axis in axes), *(axis[1] for axis in axes)),
        (
            *x.stride()[:3],
            *(step * axis[3] for step, axis in zip(steps, axes, strict=True)),
            *(step * axis[2] for step, axis in zip(steps, axes, strict=True)),
        ),
    )


@given(x=views())
def test_sums_are_those_of_the_patches(x: Tensor) -> None:
    time = tuple(range(3 + (x.dim() - 3) // 2, x.dim()))
    torch.testing.assert_close(summed_patches(x), x.sum(time))
    torch.testing.assert_close(summed_patches(x, batch=True), x.sum((0, *time)))


@given(x=views(), at_once=st.sampled_from([1, 200, 2**18]))
def test_moments_are_those_of_the_patches(x: Tensor, at_once: int) -> None:
    dims = (x.dim() - 3) // 2
    rows = x.flatten(2, 2 + dims).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
    before, patches.CACHE = patches.CACHE, at_once
    try:
        torch.testing.assert_close(patch_moment(x), rows.mT @ rows)
    finally:
        patches.CACHE = before


@pytest.mark.parametrize("axis", [3, 4])
def test_views_of_other_kinds_are_summed_as_they_are(axis: int) -> None:
    """An expanded view has no input of its own behind it."""
    shape = [2, 1, 2, 3, 4]
    shape[axis] = 1
    x = torch.randn(shape, dtype=torch.float64).expand(2, 1, 2, 3, 4)
    torch.testing.assert_close(summed_patches(x), x.sum(4))
    rows = x.flatten(2, 3).permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(patch_moment(x), rows.mT @ rows)
