"""Whose rows are whose where a sum looks like one sample's: a large sample beside small ones, whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import loop_grads_of
from torch import Tensor

import persample
from persample.attribution.owner import Output
from persample.attribution.support import supported_by

seeds = st.integers(0, 2**16)


@given(st.integers(1, 70), st.integers(1, 3), seeds, st.booleans())
def test_any_assignment_is_found_whatever_the_sizes(batch: int, each: int, seed: int, scattered: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch * each, 3) if scattered else (batch * each,)
    ids = torch.randint(batch, shape, generator=generator)
    z = torch.randint(1, 4, (batch * each, 3), generator=generator) * torch.logspace(-30, 6, batch * each)[:, None]
    of_entry = ids if scattered else ids[:, None].expand_as(z)

    def backward(weights: Tensor) -> Sequence[Tensor]:
        return [weights[of_entry] * z]

    [owner] = supported_by(backward, torch.ones(batch), [Output.of(z)], nullcontext)
    assert owner is not None
    assert torch.equal(owner.of_entries(z.shape), of_entry)


@given(st.integers(2, 40), seeds, st.floats(-38, 0))
def test_the_smallest_part_is_seen(batch: int, seed: int, power: float) -> None:
    """Far below the last bit of what it is added to."""
    rows = torch.randn(batch, 3, generator=torch.Generator().manual_seed(seed))
    mixing = torch.eye(batch)
    mixing[0, -1] = 10**power

    def backward(weights: Tensor) -> Sequence[Tensor]:
        return [mixing @ (weights[:, None] * rows)]

    assert supported_by(backward, torch.ones(batch), [Output.of(rows)], nullcontext) == [None]


@given(seeds, st.sampled_from([1.0, 1e-5, 1e-12, 1e-20, 1e-30]), st.booleans(), st.booleans(), st.booleans())
def test_rows_of_losses_that_are_whole_or_small(seed: int, small: float, whole: bool, last: bool, check: bool) -> None:
    """Parameters that meet the data through an operation of their own, which sums over samples."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        numbers = torch.randint(-3, 4, shape, generator=generator) if whole else torch.randn(shape, generator=generator)
        return numbers.double()

    batch = int(torch.randint(2, 7, (), generator=generator))
    a, w, x = draw().div(3).requires_grad_(), draw(3).requires_grad_(), draw(batch, 3)
    losses = (x @ (w * 2)) * a.exp() if last else (x * (w * a.exp())).sum(1)
    losses = losses * torch.where(torch.arange(batch) > 0, small, 1.0)
    found = persample.grad(losses, (a, w), check=check)
    for rows, right in zip(found, loop_grads_of(losses, {"a": a, "w": w}).values(), strict=True):
        for row, one in zip(rows, right, strict=True):
            torch.testing.assert_close(row, one, rtol=1e-9, atol=1e-12 * small)


@pytest.mark.parametrize("backend", ["outputs", "hooks"])
def test_a_sample_that_vanishes_beside_another(backend: str) -> None:
    """A table of positions, a sum over samples; in single precision the others' parts leave no bit in it."""

    class Positions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.lin = torch.nn.Embedding(6, 5), torch.nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return (self.lin(x) + self.table(torch.arange(6))).tanh()

    model, x, scale = Positions(), torch.randn(3, 6, 5), torch.tensor([1.0, 1e-12, 1e-20])

    def losses_of(outputs: Tensor, factor: Tensor) -> Tensor:
        return factor * outputs.sum((1, 2))

    if backend == "hooks":
        with pytest.raises(persample.UnsupportedError, match="table"):
            persample.per_sample(model, losses_of, x, scale, backend=backend)
        return
    found = persample.per_sample(model, losses_of, x, scale).grads()
    for name, rows in loop_grads_of(losses_of(model(x), scale), dict(model.named_parameters())).items():
        for row, one in zip(found[name], rows, strict=True):
            torch.testing.assert_close(row, one, rtol=1e-4, atol=1e-6 * float(one.abs().max()))
