"""Whose row is whose: probing with powers of two, the regular layouts, and what a tolerance would let through."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from weakref import ref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import loop_grads, rel_err
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import persample
from persample.attribution.owner import NOBODY, Output, Owner
from persample.attribution.probing import attribute
from persample.attribution.proof.batching_rules import axis_layout, stride_of
from persample.attribution.proof.proven import proven
from persample.attribution.support import supported_by
from persample.attribution.uses import find_uses
from persample.graph.nodes import edge_shape, trace
from persample.testing.cases import CASES, Case, call

seeds = st.integers(0, 2**16)


def located(owner: Tensor, axis: int, batch: int, others: int, dtype: torch.dtype, seed: int) -> Owner | None:
    """What `locate` finds for rows of these owners along an axis, the losses scaled over twenty orders."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(owner), others, generator=generator).to(dtype)
    rows *= torch.logspace(-8, 2, len(owner)).to(dtype)[:, None] if dtype == torch.float64 else 1

    def backward(weights: Tensor) -> list[Tensor]:
        return [(rows * weights[owner][:, None]).movedim(0, axis)]

    losses = torch.ones(batch, dtype=dtype)
    [z], [found] = attribute(backward, losses)
    if found is None and z is not None:  # float16 loses digits under the probes
        [found] = supported_by(backward, losses, [Output.of(z)], nullcontext)
    return found


@given(st.integers(1, 70), st.integers(1, 4), st.integers(0, 1), seeds, st.sampled_from(["f64", "f32", "bf16", "f16"]))
def test_any_assignment_is_found(batch: int, per: int, axis: int, seed: int, precision: str) -> None:
    dtype = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[precision]
    ids = torch.randint(batch, (batch * per + 1,), generator=torch.Generator().manual_seed(seed))
    owner = located(ids, axis, batch, 64, dtype, seed)
    assert owner is not None
    if batch > 1:
        assert owner.axis == axis
        assert torch.equal(owner.ids, ids)


def test_samples_that_only_the_second_probe_tells_apart() -> None:
    """The first probe agrees with sample b at index b, and is not kept; the second does not."""
    ids = torch.arange(64).roll(32)
    owner = located(ids, 0, 64, 8, torch.float64, 0)
    assert owner is not None
    assert torch.equal(owner.ids, ids)


def test_what_lies_sample_by_sample_is_shown_once_and_not_kept() -> None:
    rows, seen = torch.randn(40, 3), []

    def watch(weights: Tensor, visit: Callable[[int, Tensor], object]) -> None:
        probe = rows * weights[:, None]
        seen.append(ref(probe))
        visit(0, probe)

    zs, owners = attribute(lambda weights: [rows], torch.ones(40), watch=watch)
    assert zs[0] is rows
    assert owners[0] is not None
    assert owners[0].layout == "identity"
    assert [probe() for probe in seen] == [None, None]


@given(st.integers(2, 40), seeds, st.sampled_from([1.0, 1e-3, 1e-6]))
def test_the_faintest_mixing_is_seen(batch: int, seed: int, share: float) -> None:
    """Another sample's part in a row shows, down to 1e-6 in double precision."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(batch, 8, generator=generator, dtype=torch.float64)
    mixing = torch.eye(batch, dtype=torch.float64)
    mixing[0, 1] = share

    def backward(weights: Tensor) -> list[Tensor]:
        return [mixing @ (weights[:, None] * rows)]

    assert attribute(backward, torch.ones(batch, dtype=torch.float64))[1][0] is None


def test_rows_of_zeros_follow_the_pattern_of_the_others() -> None:
    rows = torch.randn(12, 3).double()
    rows[[2, 7]] = 0

    def backward(weights: Tensor) -> list[Tensor]:
        return [rows * weights.repeat(3)[:, None]]

    owner = attribute(backward, torch.ones(4, dtype=torch.float64))[1][0]
    assert owner is not None
    assert owner.layout == "tiled"
    assert NOBODY not in owner.ids


@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from(["identity", "grouped", "tiled", "ragged"]), seeds)
def test_by_sample_and_masked_agree(batch: int, per: int, layout: str, seed: int) -> None:
    """Rows brought together by sample sum to what masking gives, whatever the layout."""
    generator = torch.Generator().manual_seed(seed)
    arange = torch.arange(batch)
    ids = {
        "identity": arange,
        "grouped": arange.repeat_interleave(per),
        "tiled": arange.repeat(per),
        "ragged": torch.randint(-1, batch, (batch * per,), generator=generator),
    }[layout]
    owner = Owner(1, ids, batch)
    values = torch.randn(2, len(ids), 3, dtype=torch.float64, generator=generator)
    masked = owner.masked(values, slice(0, batch))
    torch.testing.assert_close(owner.by_sample(values).sum(1), masked.sum(2))
    torch.testing.assert_close(owner.sum_by_sample(values), masked.sum(2))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 4), st.data())
def test_lying_and_stride_are_inverse(shape: list[int], batch: int, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    inner = data.draw(st.integers(1, 3))
    shape[axis] = batch * inner * data.draw(st.integers(1, 2))
    entries = torch.arange(torch.Size(shape).numel()).view(shape)
    below = torch.Size(shape[axis + 1 :]).numel()
    found = axis_layout(inner * below, shape, batch)
    assert found is not None
    assert stride_of(found, shape) == inner * below
    along = entries // (inner * below) % batch
    index = torch.arange(shape[found.axis]) // found.inner % batch
    expected = index.view(-1, *(1 for _ in shape[found.axis + 1 :])).expand_as(along)
    assert torch.equal(along, expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_proven_is_what_probing_finds(case: Case) -> None:
    """On every case that separates, the proof names the axis and the order that probing found."""
    model, loss_fn, inputs, targets = case.build()
    losses = loss_fn(call(model, inputs), targets)
    if losses.shape[0] < 2:
        pytest.skip("nothing to attribute with fewer than two samples")
    graph = trace(losses)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    uses, known = find_uses(graph, losses, parameters, "error", None)
    places = proven(graph, [use.node for found in uses.values() for use in found], len(losses))
    for (node, output), place in (places or {}).items():
        owner = known.owners[node][output]
        if owner is None:
            continue
        index = torch.arange(edge_shape((node, output))[place.axis]) // place.inner % len(losses)
        assert owner.axis == place.axis
        assert torch.equal(torch.where(owner.ids == NOBODY, index, owner.ids), index)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.axes == 0 and not c.coupled and not c.tags & {"random", "stateful", "empty"}],
    ids=lambda case: case.name,
)
def test_a_kept_plan_is_right_for_other_samples(case: Case) -> None:
    """The samples in another order, on the same model: what was learnt from the first batch may not stick."""
    model, loss_fn, inputs, targets = case.build()
    batch = len(persample.per_sample(model, loss_fn, inputs, targets).losses)

    def rolled(leaf: object) -> object:
        return leaf.roll(1, 0) if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == batch else leaf

    inputs, targets = tree_map(rolled, (inputs, targets))
    expected = loop_grads(model, loss_fn, inputs, targets)
    for _ in range(9):  # one of them verifies a use in turn
        found = persample.per_sample(model, loss_fn, inputs, targets).grads()
    largest = max((float(rows.abs().max()) for rows in expected.values() if rows.numel()), default=1.0)
    tolerance = 1e-5 if "float32" in case.tags else 1e-9
    for name, rows in expected.items():
        assert rel_err(found[name], rows) < tolerance or float((found[name] - rows).abs().max()) < 1e-13 * largest


class Positions(nn.Module):
    """A position table added to a layer: z of the table sums over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lin, self.head = nn.Embedding(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.lin(x) + self.table(torch.arange(x.shape[1]))).tanh()).mean(1)


@pytest.mark.parametrize("bias", [9.0, 30.0, 60.0])
@pytest.mark.parametrize("backend", ["outputs", "vmap"])
def test_a_dominant_sample_owns_nothing_shared(bias: float, backend: str) -> None:
    """A confident classifier in float32, one sample misclassified: the others' parts almost vanish in sums."""
    model, x, y = Positions(), torch.randn(4, 6, 5), torch.tensor([0, 0, 0, 1])
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([bias, 0, 0]))

    def loss_fn(out: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out, targets, reduction="none")

    expected = loop_grads(model, loss_fn, x, y)
    for _ in range(2):
        found = persample.per_sample(model, loss_fn, x, y, backend=backend).grads()
        for name, rows in expected.items():
            for row, right in zip(found[name], rows, strict=True):  # sample by sample: the small ones count as well
                torch.testing.assert_close(row, right, rtol=1e-3, atol=1e-6 * float(right.abs().max()))


def test_hooks_refuses_what_it_cannot_separate() -> None:
    model, scale = Positions(), torch.tensor([1e-5, 1e-5, 1e-5, 1.0])
    with pytest.raises(persample.UnsupportedError, match="table"):
        persample.per_sample(model, lambda out, s: s * out.sum(1), torch.randn(4, 6, 5), scale, backend="hooks")


@given(seeds, st.sampled_from([1e-3, 1e-5, 1e-9]))
def test_features_as_many_as_samples(seed: int, small: float) -> None:
    """D = B and one sample much larger: the axis of the features must not be taken for that of the samples."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    x, scale = torch.randn(4, 6, 5).double(), torch.tensor([small, small, small, 1.0]).double()
    expected = loop_grads(model, lambda out, s: s * out.square().sum((1, 2)), x, scale)
    found = persample.per_sample(model, lambda out, s: s * out.square().sum((1, 2)), x, scale).grads()
    for name, rows in expected.items():
        for row, right in zip(found[name], rows, strict=True):
            torch.testing.assert_close(row, right, rtol=1e-9, atol=1e-12 * float(right.abs().max()))


def test_weak_coupling_beside_a_dominant_sample_is_refused() -> None:
    model, scale = nn.Linear(5, 3), torch.tensor([1e-4, 1e-4, 1.0])
    with pytest.raises(persample.CoupledSamplesError):
        persample.per_sample(
            model, lambda out, s: s * (out - 5e-4 * out.mean(0)).square().sum(1), torch.randn(3, 5), scale
        )


def test_nan_with_as_many_features_as_samples() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 4)).double()
    x = torch.randn(4, 6, 5).double()
    x[1, 2, 3] = torch.nan
    norms = persample.per_sample(model, lambda out, _: out.square().sum((1, 2)), x).norms()
    assert norms.isnan().tolist() == [False, True, False, False]
