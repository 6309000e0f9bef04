"""Sums over the batch of what rows are squared to: those of the rows, cross terms of several uses included."""

from __future__ import annotations

import pytest
import torch
from drawn import batches, blocks, sizes
from hypothesis import given
from hypothesis import strategies as st

from persample.blocks import chunking
from persample.blocks.consumed import row_parts, squared_deviations, sum_of_squares
from persample.blocks.convolution.algorithms import ConvSpec
from persample.blocks.reductions import materialise
from persample.blocks.types import Block, Conv, Dense, Outer, Rows


@given(st.data(), sizes, sizes, batches, st.integers(1, 3))
def test_those_of_the_rows(data: st.DataObject, out: int, inp: int, batch: int, count: int) -> None:
    uses = [data.draw(blocks((out, inp), batch)) for _ in range(count)]
    rows = sum(materialise(block) for block in uses)
    assert isinstance(rows, torch.Tensor)
    torch.testing.assert_close(sum_of_squares(uses), rows.square().sum(0))
    if batch:
        torch.testing.assert_close(squared_deviations(uses), (rows - rows.mean(0)).square().sum(0))


CONV = ConvSpec((4, 3, 3), (1,), (1,), (1,), False, (0,), 1)
KINDS: dict[str, Block] = {
    "positions": Outer(torch.randn(9, 4, 70), torch.randn(9, 4, 60)),
    "one position": Outer(torch.randn(9, 1, 70), torch.randn(9, 1, 60)),
    "convolution": Conv(torch.randn(9, 3, 8), torch.randn(9, 4, 8), CONV),
    "table": Rows(torch.randint(5, (9, 4)), torch.randn(9, 4, 3), 5),
    "complex": Dense(torch.randn(9, 3, 2, dtype=torch.complex64)),
    "half": Outer(torch.randn(9, 1, 7).bfloat16(), torch.randn(9, 1, 6).bfloat16()),
}


@pytest.mark.parametrize("chunk_bytes", [1, 2**30])
@pytest.mark.parametrize("kind", KINDS)
def test_any_parts_of_any_kind(monkeypatch: pytest.MonkeyPatch, kind: str, chunk_bytes: int) -> None:
    monkeypatch.setattr(chunking, "CHUNK_BYTES", chunk_bytes)
    block = KINDS[kind]
    rows = materialise(block)
    for uses, each in (([block], rows), ([block, block], 2 * rows)):
        squares, deviations = each.abs().square().sum(0), (each - each.mean(0)).abs().square().sum(0)
        torch.testing.assert_close(sum_of_squares(uses), squares, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(squared_deviations(uses), deviations, rtol=1e-5, atol=1e-4)
    parts = list(row_parts([block]))
    assert len(parts) > 1 or chunk_bytes > 1 or kind == "half"


def test_parts_show_every_entry_once() -> None:
    block = KINDS["positions"]
    found = torch.zeros(9, block.numel)
    for samples, entries, rows in row_parts([block]):
        found[samples, entries] += rows
    torch.testing.assert_close(found, materialise(block).flatten(1))


def test_samples_that_agree_have_no_variance() -> None:
    """Where Σ g² - B ḡ² would be rounding alone."""
    x, z = torch.randn(1, 1, 5).expand(6, 1, 5), torch.randn(1, 1, 4).expand(6, 1, 4)
    offsets = 1e-3 * torch.randn(6, 1, 4)
    assert squared_deviations([Outer(x, z)]).abs().max() < 1e-12
    exact = materialise(Outer(x.double(), (z + offsets).double()))
    want = (exact - exact.mean(0)).square().sum(0)
    torch.testing.assert_close(squared_deviations([Outer(x, z + offsets)]).double(), want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_factors_whose_squares_are_no_numbers(size: float) -> None:
    x, z = torch.randn(5, 1, 4), torch.randn(5, 1, 3)
    z[1] = 0
    scaled = Outer(x / size, z * size)
    torch.testing.assert_close(sum_of_squares([scaled]), sum_of_squares([Outer(x, z)]), rtol=1e-5, atol=0)


def test_a_sample_that_is_not_finite_is_seen() -> None:
    x, z = torch.randn(5, 1, 4), torch.randn(5, 1, 3)
    z[2, 0, 1] = torch.nan
    found = sum_of_squares([Outer(x, z)])
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()
