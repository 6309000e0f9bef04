"""Strategies for blocks: one of each kind, with rows of a few entries."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from persample.blocks.types import Block, Dense, Outer, Pulled, Rows, Stacked

sizes = st.integers(1, 5)
seeds = st.integers(0, 2**16)
batches = st.integers(0, 4)


@st.composite
def blocks(draw: st.DrawFn, shape: tuple[int, int] | None = None, batch: int | None = None) -> Block:
    """A block of each kind, its rows of one shape [out, inp] if that is given."""
    generator = torch.Generator().manual_seed(draw(seeds))
    batch = draw(batches) if batch is None else batch
    out, inp = shape or (draw(sizes), draw(sizes))
    time = draw(sizes)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator)

    kind = draw(st.sampled_from(["outer", "rows", "dense", "pulled", "view", "stacked"]))
    if kind == "outer":
        return Outer(normal(batch, time, inp), normal(batch, time, out))
    if kind == "rows":
        return Rows(torch.randint(out, (batch, time), generator=generator), normal(batch, time, inp), out)
    if kind == "dense":
        return Dense(normal(batch, out, inp))
    if kind == "stacked":  # slices are rows of the parameter, or columns
        dim = draw(st.integers(0, 1))
        places = draw(st.sets(st.integers(0, (out, inp)[dim] - 1), min_size=1))
        parts = tuple((place, Dense(normal(batch, (inp, out)[dim]))) for place in sorted(places))
        return Stacked(parts, dim, (out, inp))
    inner = Outer(normal(batch, time, out), normal(batch, time, inp))
    if kind == "view":
        return Pulled(inner, lambda rows: rows.transpose(1, 2), (out, inp), isometric=True)
    return Pulled(inner, lambda rows: 2 * rows.transpose(1, 2), (out, inp))
