"""Whose rows are whose without holding z: the same owners as by comparing, the same refusals, and what is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import persample
from persample.attribution import fingerprints, separation
from persample.attribution.fingerprints import Fingerprints, recognise
from persample.attribution.owner import Owner
from persample.attribution.probing import attribute
from persample.attribution.uses import find_uses
from persample.graph.nodes import trace
from persample.graph.provenance import Provenance
from persample.testing.cases import CASES, Case, call

PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
seeds = st.integers(0, 2**16)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers between 1/2 and 2 of either sign, so that no precision loses digits under the probes; some are zero."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.rand(shape, generator=generator) * 1.5 + 0.5
    z *= 2 * torch.randint(2, shape, generator=generator) - 1
    z[torch.rand(shape, generator=generator) < 0.2] = 0
    return torch.complex(z, z.flip(0)).to(dtype) if dtype.is_complex else z.to(dtype)


def both_ways(z: Tensor, ids: Tensor, axis: int, batch: int) -> tuple[Owner | None, Owner | None]:
    """The owner of z by fingerprints, and by comparison."""

    def weighted(weights: Tensor) -> Tensor:
        factors = weights[ids].view([-1 if d == axis else 1 for d in range(z.ndim)])
        return torch.empty_strided(z.shape, z.stride(), dtype=z.dtype).copy_(z * factors)

    def watch(weights: Tensor, visit: Callable[[int, Tensor], object]) -> None:
        visit(0, weighted(weights))

    losses = torch.ones(batch, dtype=z.dtype.to_real())
    return recognise(watch, losses, 1)[1][0], attribute(lambda weights: [weighted(weights)], losses)[1][0]


@given(
    st.integers(1, 70), st.integers(1, 3), st.lists(st.integers(1, 6), min_size=1, max_size=3), seeds,
    st.sampled_from(PRECISIONS), st.sampled_from(["grouped", "tiled", "ragged"]), st.sampled_from([3, 64, 512]),
    st.data(),
)  # fmt: skip
def test_the_same_owners_as_by_comparison(
    batch: int, each: int, others: list[int], seed: int, dtype: torch.dtype, lie: str, piece: int, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(0, len(others)))
    arange = torch.arange(batch)
    ids = arange.repeat_interleave(each) if lie == "grouped" else arange.repeat(each)
    if lie == "ragged":
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    z = drawn((*others[:axis], batch * each, *others[axis:]), dtype, seed)
    order = data.draw(st.permutations(range(z.ndim)))  # of memory
    z = z.permute(order).contiguous().permute([order.index(d) for d in range(z.ndim)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprints, "PIECE", piece)
        found, expected = both_ways(z, ids, axis, batch)
    assert expected is not None
    if found is None:
        assert expected.axis is None or z.shape[expected.axis] % batch  # no axis explains it
        return
    assert found.axis == expected.axis
    assert torch.equal(found.ids, expected.ids)


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "the last bit": lambda entry: torch.nextafter(entry, entry.new_full((), torch.inf)),
    "the sign": lambda entry: -entry,
    "another sample's weight": lambda entry: 2 * entry,
    "nothing left": lambda entry: 0 * entry,
    "not a number": lambda entry: torch.nan * entry,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_entry_that_is_not_the_samples_own(fault: str, dtype: torch.dtype) -> None:
    z = drawn((40, 30, 30), dtype, 0).abs() + 1

    def watch(weights: Tensor, visit: Callable[[int, Tensor], object]) -> None:
        probe = z * weights[:, None, None]
        if bool((weights != 1).any()):
            probe[7, 29, 29] = FAULTS[fault](probe[7, 29, 29])
        visit(0, probe)

    assert recognise(watch, torch.ones(40, dtype=dtype), 1)[1] == [None]


def test_rows_of_two_samples_whose_number_is_none_of_the_batch() -> None:
    z, calls = drawn((40, 3), torch.float64, 0).abs() + 1, iter([7, 31, 39])

    def watch(weights: Tensor, visit: Callable[[int, Tensor], object]) -> None:
        weights = weights.clone()
        weights[7] = weights[next(calls)]  # digits 31 and 1: sample 63 of 40
        visit(0, z * weights[:, None])

    assert recognise(watch, torch.ones(40, dtype=torch.float64), 1)[1] == [None]


@given(st.integers(1, 9), st.integers(1, 9), seeds)
def test_entries_that_change_places_change_the_fingerprint(first: int, gap: int, seed: int) -> None:
    """Whether in one piece or in two."""
    row = drawn((1, 24), torch.float32, seed) + torch.arange(24) * 8
    changed = row.clone()
    changed[0, [first, first + gap]] = row[0, [first + gap, first]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprints, "PIECE", 4)
        assert fingerprints.fingerprint(row, 0) != fingerprints.fingerprint(changed, 0)


def test_what_is_left_open_is_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[Any]] = []
    compare = separation._compare

    def noted(graph: Any, losses: Tensor, nodes: list[Any], *rest: Any) -> None:
        groups.append(nodes)
        compare(graph, losses, nodes, *rest)

    def none(watch: Any, losses: Tensor, count: int, part: slice) -> Any:
        outputs, owners = recognise(watch, losses, count, part)
        return outputs, [None] * len(owners)

    monkeypatch.setattr(separation, "_compare", noted)
    monkeypatch.setattr(separation, "recognise", none)
    monkeypatch.setattr(separation, "SMALLEST", 0)
    model = network()
    x = torch.randn(4, 3, 16, 16)
    with Provenance(model) as provenance:
        provenance.follow(x)
        losses = squares(model(x), None)
    graph = trace(losses)
    uses, known = find_uses(graph, losses, dict(model.named_parameters()), "error", provenance, keep=False)
    nodes = {use.node for found in uses.values() for use in found}
    assert [node for group in groups for node in group] == sorted(nodes, key=graph.order.__getitem__)
    assert separation.PARTS <= len(groups) <= 2 * separation.PARTS
    assert all(known.separated(node) for node in nodes)


def test_numbers_that_lose_digits_are_left_open() -> None:
    z = drawn((40, 3), torch.float32, 0) * 1e-38
    found, expected = both_ways(z, torch.arange(40), 0, 40)
    assert found is None
    assert expected is not None


def test_places_without_a_gradient_and_batches_of_one() -> None:
    def watch(weights: Tensor, visit: Callable[[int, Tensor], object]) -> None:
        visit(1, torch.ones(2, 3))

    outputs, owners = recognise(watch, torch.ones(1), 2)
    assert (outputs[0], owners[0]) == (None, None)
    assert outputs[1] is not None
    assert (outputs[1].shape, outputs[1].dtype) == ((2, 3), torch.float32)
    assert owners[1] is not None
    assert owners[1].ids.tolist() == [0, 0]


@pytest.fixture
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separation, "SMALLEST", 0)
    monkeypatch.setattr(separation, "PARTS", 3)


@pytest.mark.usefixtures("few_at_a_time")
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] if place % 5 else []) for place, c in enumerate(CASES)],
    ids=[case.name for case in CASES],
)
def test_every_case_as_with_z_kept(case: Case) -> None:
    """The same uses, owners and refusals."""
    model, loss_fn, inputs, targets = case.build()
    losses = loss_fn(call(model, inputs), targets)
    graph = trace(losses)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept, dropped = (find_uses(graph, losses, parameters, "rows", None, keep=keep) for keep in (True, False))
    assert kept[0] == dropped[0]
    assert not dropped[1].zs
    for node in {use.node for uses in kept[0].values() for use in uses}:
        for before, now in zip(kept[1].owners[node], dropped[1].owners[node], strict=True):
            assert (before is None) == (now is None)
            if before is not None and now is not None:
                assert before.axis == now.axis
                assert torch.equal(before.ids, now.ids)
        assert [z is None for z in kept[1].zs[node]] == [z is None for z in dropped[1].outputs[node]]


@pytest.mark.usefixtures("few_at_a_time")
@pytest.mark.parametrize("case", [c for c in CASES if c.coupled], ids=lambda case: case.name)
def test_what_is_refused_is_refused_with_the_same_words(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome() -> str:
        model, loss_fn, inputs, targets = case.build()
        try:
            persample.per_sample(model, loss_fn, inputs, targets)
        except persample.PerSampleError as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    dropped = outcome()
    monkeypatch.setattr(separation.Separation, "__init__", _keeping(separation.Separation.__init__))
    assert dropped == outcome()


def _keeping(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, keep: bool = True, **fields: Any) -> None:
        original(self, keep=True, **fields)

    return init


def network(depth: int = 12) -> nn.Sequential:
    layers = [layer for _ in range(depth) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *layers, nn.Flatten(), nn.Linear(8 * 16 * 16, 2))


def squares(outputs: Tensor, _: Any) -> Tensor:
    return outputs.square().flatten(1).sum(1)


def test_one_z_at_a_time_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ref[Tensor]] = []
    alive: list[int] = []
    original = Fingerprints.__init__

    def noted(self: Fingerprints, z: Tensor, *rest: Any) -> None:
        alive.append(sum(each() is not None for each in seen))
        seen.append(ref(z))
        original(self, z, *rest)

    monkeypatch.setattr(Fingerprints, "__init__", noted)
    persample.per_sample(network(), squares, torch.randn(4, 3, 16, 16), hold="graph")
    assert len(alive) == 26
    assert max(alive) <= 2


def peak(run: Callable[[], object]) -> int:
    """Bytes of tensors at the peak, above what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    total = highest = 0
    for _, change in changes:
        total += change
        highest = max(highest, total)
    return highest


@pytest.fixture
def quiet_profiler() -> None:
    """Without the lines that the first profile of a process writes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        torch.zeros(1)


@pytest.mark.parametrize("hold", ["factors", "graph"])
@pytest.mark.usefixtures("quiet_profiler")
def test_the_first_call_takes_little_more_than_a_backward_pass(hold: str) -> None:
    x = torch.randn(32, 3, 16, 16)
    model = network()
    plain = peak(lambda: squares(model(x), None).sum().backward())
    model.zero_grad()
    first = peak(lambda: persample.per_sample(model, squares, x, hold=hold).norms())
    assert first <= 1.3 * plain
