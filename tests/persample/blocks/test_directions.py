"""Inner products with many directions: the same in both orders, whatever holds the rows."""

from __future__ import annotations

import pytest
import torch
from drawn import blocks, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import persample
from persample.blocks import chunking, directions
from persample.blocks.reductions import materialise, real_rows
from persample.blocks.types import Block, Dense, Outer


@given(blocks(), seeds, st.integers(0, 6))
def test_those_of_the_rows(block: Block, seed: int, count: int) -> None:
    torch.manual_seed(seed)
    vectors = torch.randn(count, *block.shape, dtype=torch.float64)
    want = real_rows(materialise(block)) @ vectors.flatten(1).T
    torch.testing.assert_close(directions.dot(block, vectors), want)


@pytest.mark.parametrize("chunk_bytes", [1, 2**30])
@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_orders_and_any_parts(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, factors: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(chunking, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(directions, "from_factors", lambda *_: factors)
    block = Outer(torch.randn(9, 4, 70, dtype=dtype), torch.randn(9, 4, 60, dtype=dtype))
    vectors = torch.randn(5, 60, 70, dtype=dtype)
    want = materialise(block).flatten(1) @ vectors.flatten(1).T
    tolerance = {"rtol": 1e-4, "atol": 2e-3} if dtype == torch.float32 else {}
    torch.testing.assert_close(directions.dot(block, vectors), want, **tolerance)  # type: ignore[arg-type]


def test_the_order_is_chosen_by_cost() -> None:
    assert directions.from_factors(1, 16)
    assert directions.from_factors(32, 1)
    assert not directions.from_factors(32, 16)


def test_complex_rows_and_directions() -> None:
    block = Dense(torch.randn(3, 4, dtype=torch.complex128))
    vectors = torch.randn(2, 4, dtype=torch.complex128)
    want = torch.view_as_real(block.values).flatten(1) @ torch.view_as_real(vectors).flatten(1).T
    torch.testing.assert_close(directions.dot(block, vectors), want)


def result() -> persample.PerSampleGrads:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    found = persample.per_sample(model, lambda y, _: y.square().sum(1), torch.randn(5, 4))
    assert isinstance(found, persample.PerSampleGrads)
    return found


def test_no_directions_and_those_of_some_parameters() -> None:
    psg, some = result(), torch.randn(7, 3)
    assert psg.dot({"0.bias": some[:0]}).shape == (5, 0)
    torch.testing.assert_close(psg.dot({"0.bias": some}), psg.grads()["0.bias"] @ some.T)
    torch.testing.assert_close(psg.dot({"0.bias": some})[:, 2], psg.dot({"0.bias": some[2]}))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"0.bias": (3,), "1.weight": (2, 2, 3)}, "same number of directions.*'0.bias' one, '1.weight' 2.*expand"),
        ({"0.bias": (4, 3), "1.weight": (2, 2, 3)}, "'0.bias' 4, '1.weight' 2"),
        ({"0.bias": (2, 4)}, r"shape \(3,\), or \[k, \*shape\] for k directions; got \(2, 4\)"),
        ({"0.bias": (2, 2, 3)}, "for k directions"),
        ({"0.bias": ()}, "for k directions"),
    ],
)
def test_mixed_ranks_are_told(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        result().dot({name: torch.zeros(shape) for name, shape in shapes.items()})
