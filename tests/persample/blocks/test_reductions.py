"""Every reduction of every block against the rows themselves, in both exact forms where there are two."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from drawn import batches, blocks, seeds, sizes
from hypothesis import given
from hypothesis import strategies as st

from persample import force_kernel
from persample.blocks import chunking, reductions
from persample.blocks.products import LONGEST, gram_of_rows
from persample.blocks.reductions import materialise, real_rows
from persample.blocks.types import Block, Dense, Outer
from persample.memory import workspace


@given(blocks(), seeds)
def test_reductions_equal_those_of_the_rows(block: Block, seed: int) -> None:
    torch.manual_seed(seed)
    rows = materialise(block)
    flat = real_rows(rows)
    c = torch.randn(block.batch, dtype=torch.float64)
    assert rows.shape == (block.batch, *block.shape)
    torch.testing.assert_close(reductions.squared_norms(block), flat.square().sum(1))
    torch.testing.assert_close(reductions.gram(block), flat @ flat.T)
    torch.testing.assert_close(reductions.weighted_sum(block, c), torch.tensordot(c, rows, 1))
    torch.testing.assert_close(materialise(block, torch.full_like(rows, torch.nan)), rows)


@given(st.data(), sizes, sizes, batches, batches)
def test_pairs_of_blocks(data: st.DataObject, out: int, inp: int, batch: int, other: int) -> None:
    a, b = data.draw(blocks((out, inp), batch)), data.draw(blocks((out, inp), batch))
    far = data.draw(blocks((out, inp), other))
    rows = real_rows(materialise(a))
    torch.testing.assert_close(reductions.inner(a, b), (rows * real_rows(materialise(b))).sum(1))
    torch.testing.assert_close(reductions.gram(a, far), rows @ real_rows(materialise(far)).T)


@pytest.mark.parametrize("smallest_kept", [1, 2**17])
@pytest.mark.parametrize("form", ["hadamard", "materialise"])
@pytest.mark.parametrize("chunk_bytes", [1, 2**30])
@pytest.mark.parametrize(("batch", "time", "inp", "out"), [(4, 1, 6, 7), (4, 3, 6, 7), (17, 9, 2, 2), (140, 2, 3, 2)])
def test_both_forms_and_any_chunks(
    monkeypatch: pytest.MonkeyPatch,
    chunk_bytes: int,
    form: str,
    smallest_kept: int,
    batch: int,
    time: int,
    inp: int,
    out: int,
) -> None:
    """Symmetric matrices take only the blocks on and below the diagonal, in one form and in the other."""
    monkeypatch.setattr(chunking, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(workspace, "SMALLEST", smallest_kept)
    block = Outer(torch.randn(batch, time, inp).double(), torch.randn(batch, time, out).double())
    other = Outer(torch.randn(3, time + 1, inp).double(), torch.randn(3, time + 1, out).double())
    rows, more = materialise(block).flatten(1), materialise(other).flatten(1)
    moved = materialise(replace(block, x=block.x + 1)).flatten(1)
    with force_kernel(form):
        torch.testing.assert_close(reductions.squared_norms(block), rows.square().sum(1))
        torch.testing.assert_close(reductions.gram(block), rows @ rows.T)
        torch.testing.assert_close(reductions.gram(block, other), rows @ more.T)
        torch.testing.assert_close(reductions.inner(block, replace(block, x=block.x + 1)), (rows * moved).sum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    block = Outer(torch.randn(2, 4096, 3).to(dtype), torch.rand(2, 4096, 3).to(dtype))
    exact = Outer(block.x.double(), block.z.double())
    assert materialise(block).dtype == torch.float32
    torch.testing.assert_close(materialise(block).double(), materialise(exact), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        reductions.squared_norms(block).double(), reductions.squared_norms(exact), rtol=1e-4, atol=1e-3
    )


def test_complex_rows_have_real_inner_products() -> None:
    block = Dense(torch.randn(3, 4, dtype=torch.complex128))
    rows = block.values
    torch.testing.assert_close(reductions.gram(block), (rows @ rows.conj().T).real)


def test_unknown_block_says_how_to_register() -> None:
    with pytest.raises(TypeError, match=r"materialise\.register"):
        materialise(Block())


@pytest.mark.parametrize("batch", [3, 127, 128, 300])
def test_symmetric_products_from_blocks_on_one_side_of_the_diagonal(batch: int) -> None:
    torch.manual_seed(batch)
    rows = torch.randn(batch, 2 * LONGEST + 5 if batch == 128 else 20_000, dtype=torch.float32)
    exact = rows.double() @ rows.double().T
    torch.testing.assert_close(gram_of_rows(rows).double(), exact, rtol=1e-4, atol=1e-5 * exact.max().item())
    torch.testing.assert_close(gram_of_rows(rows), gram_of_rows(rows).T)
