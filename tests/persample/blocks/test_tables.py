"""Gram matrices of tables in both forms against the tables themselves, with rows that one or some or all touch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persample.blocks import chunking
from persample.blocks.kinds import tables
from persample.blocks.reductions import materialise
from persample.blocks.types import Rows


@pytest.mark.parametrize("chunk_bytes", [1, 2**30])
@given(
    batch=st.integers(0, 9),
    other=st.integers(0, 4),
    times=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    vocabulary=st.sampled_from([1, 2, 7, 100]),
    seed=st.integers(0, 2**16),
)
def test_both_forms_are_the_inner_products_of_the_tables(
    chunk_bytes: int, batch: int, other: int, times: tuple[int, int], vocabulary: int, seed: int
) -> None:
    torch.manual_seed(seed)
    a, b = (
        Rows(torch.randint(vocabulary, (size, time)), torch.randn(size, time, 3, dtype=torch.float64), vocabulary)
        for size, time in zip((batch, other), times, strict=True)
    )
    rows, more = materialise(a).flatten(1), materialise(b).flatten(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "CHUNK_BYTES", chunk_bytes)
        for form in (tables.gram, tables.by_pairs):
            torch.testing.assert_close(form(a, a), rows @ rows.T)
            torch.testing.assert_close(form(a, b), rows @ more.T)


def test_a_sample_that_is_not_finite_has_no_inner_product_with_any_other() -> None:
    """As of whole tables, in which zero times infinity is no number."""
    indices, z = torch.randint(7, (4, 3)), torch.randn(4, 3, 2)
    z[1, 2, 0], z[3, 0, 1] = torch.nan, torch.inf
    block = Rows(indices, z, 7)
    rows = materialise(block).flatten(1)
    other = Rows(indices[:2], z[:2], 7)
    for got, want in ((tables.gram(block, block), rows @ rows.T), (tables.gram(block, other), rows @ rows[:2].T)):
        finite = want.isfinite()
        assert torch.equal(got.isfinite(), finite)
        torch.testing.assert_close(got[finite], want[finite])
