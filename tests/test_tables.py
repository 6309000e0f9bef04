"""Gram matrices of tables in both forms against the tables themselves, with rows that one or some or all touch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persample import chunking, tables
from persample.blocks import Rows
from persample.reductions import materialise


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


def test_what_is_not_finite_stays_with_the_samples_that_have_it() -> None:
    indices = torch.tensor([[0, 1], [0, 2], [3, 4]])
    z = torch.ones(3, 2, 2)
    z[2, 0] = torch.inf
    k = tables.gram(*[Rows(indices, z, 5)] * 2)
    assert k.isfinite().equal(torch.tensor([[True, True, True], [True, True, True], [True, True, False]]))
