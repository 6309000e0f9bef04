"""Random projections: those of explicit matrices, the same everywhere, and inner products right on average."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from capturing import BACKENDS, captured, captured_or_refused, needs_opacus, truth
from drawn import batches, blocks, sizes
from hypothesis import given
from hypothesis import strategies as st
from oracle import rel_err
from projecting import FEW, matrix, projected
from torch import nn

import persample
from persample.blocks import chunking
from persample.blocks.convolution.algorithms import ConvSpec
from persample.blocks.reductions import materialise
from persample.blocks.types import Block, Conv
from persample.projections import SJLT, Kronecker, Mask, Projection, Rademacher
from persample.projections.families import maps_of
from persample.projections.hashing import below, hashed, signs
from persample.projections.of_blocks import features
from persample.testing.cases import CASES, Case, find

every_projection = pytest.mark.parametrize("projection", FEW.values(), ids=FEW)


def tolerance(case: Case) -> float:
    return 1e-5 if "float32" in case.tags else 1e-9


@pytest.mark.parametrize("case", [case for case in CASES if not case.coupled], ids=lambda case: case.name)
def test_every_case_as_the_matrices(case: Case) -> None:
    psg = captured_or_refused(case, "outputs")
    if isinstance(psg, persample.PerSampleError):
        return
    want = truth(case.name)[0]
    for name, projection in FEW.items():
        assert rel_err(psg.project(projection), projected(want, projection, "total")[""]) < tolerance(case), name


@needs_opacus
@every_projection
@pytest.mark.parametrize("per", ["total", "layer", "param"])
@pytest.mark.parametrize("name", ["usage/tied-weights", "layer/Conv2d(3,2,2)@3,3,7,7", "layer/Embedding(3,5)@4,2,2"])
def test_every_backend_and_group(name: str, per: str, projection: Projection) -> None:
    want = projected(truth(name)[0], projection, per)
    for backend in BACKENDS:
        found = captured(find(name).build(), backend).project(projection, per)
        assert rel_err({"": found} if per == "total" else found, want) < 1e-9


@given(st.data(), sizes, sizes, batches, st.integers(1, 2), st.sampled_from(sorted(FEW)))
def test_any_blocks(data: st.DataObject, out: int, inp: int, batch: int, count: int, which: str) -> None:
    uses = [data.draw(blocks((out, inp), batch)) for _ in range(count)]
    rows = sum(materialise(block) for block in uses)
    assert isinstance(rows, torch.Tensor)
    projection = maps_of(FEW[which], {"w": torch.empty(out, inp)}, [["w"]])["w"]
    want = rows.flatten(1) @ matrix(projection, out * inp)
    torch.testing.assert_close(features(uses, projection), want)


CONVOLUTIONS = {
    "groups": (ConvSpec((4, 2, 3), (2,), (1,), (1,), False, (0,), 2), (4, 9), (4, 5)),
    "transposed": (ConvSpec((4, 3, 3), (2,), (1,), (1,), True, (1,), 1), (4, 5), (3, 10)),
    "transposed, dilated": (ConvSpec((4, 1, 3), (2,), (0,), (3,), True, (2,), 2), (4, 5), (2, 17)),
}


@pytest.mark.parametrize("projection", [*FEW.values(), Kronecker(1, 2)], ids=[*FEW, "no rows"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("chunk_bytes", [1, 2**30])
def test_convolutions_in_any_parts(
    monkeypatch: pytest.MonkeyPatch, kind: str, projection: Projection, chunk_bytes: int
) -> None:
    monkeypatch.setattr(chunking, "CHUNK_BYTES", chunk_bytes)
    spec, x, z = CONVOLUTIONS[kind]
    block: Block = Conv(torch.randn(3, *x, dtype=torch.float64), torch.randn(3, *z, dtype=torch.float64), spec)
    found = maps_of(projection, {"w": torch.empty(spec.weight_shape)}, [["w"]])["w"]
    want = materialise(block).flatten(1) @ matrix(found, block.numel)
    torch.testing.assert_close(features([block], found), want)


# --- the same everywhere ------------------------------------------------------------------------------------


def test_signs_are_those_of_their_places() -> None:
    whole = signs(5, 70, torch.arange(40), torch.float64)
    assert whole.shape == (40, 70)
    assert set(whole.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(signs(5, 70, torch.tensor([[7], [3]]), torch.float64), whole[[7, 3]][:, None])
    assert abs(float(signs(6, 256, torch.arange(4096), torch.float64).mean())) < 0.005
    between = whole @ whole.T / 70
    assert (between - torch.eye(40)).abs().max() < 0.75


def test_numbers_below_are_spread_evenly() -> None:
    drawn = below(3, torch.arange(70_000), 7)
    assert (drawn.bincount(minlength=7) - 10_000).abs().max() < 400
    assert len(hashed(0, torch.arange(10_000)).unique()) == 10_000


PROCESS = """
import torch
from persample.projections.families import maps_of
from persample.projections import *
for projection in (Kronecker(3, 2, seed=4), Rademacher(40, seed=4), SJLT(5, seed=4), Mask(5, seed=4)):
    for shape in ((7, 6), (9,)):
        found = maps_of(projection, {"a.weight": torch.empty(shape)}, [["a.weight"]])["a.weight"]
        rows = found.rows if hasattr(found, "rows") else None
        values = rows(torch.eye(torch.empty(shape).numel()), 0) if rows else found.right(torch.ones(1))
        places = torch.arange(1, 1 + values.numel()).double()
        print(projection.k, round((values.double().flatten() @ places).item(), 2))
"""


def test_the_same_in_another_process_and_as_ever() -> None:
    """The numbers themselves: features that were stored may be compared with those of later versions."""
    run = partial(subprocess.run, [sys.executable, "-c", PROCESS], capture_output=True, text=True, check=True)
    assert run().stdout == run(env={"PYTHONHASHSEED": "7"}).stdout == AS_EVER


AS_EVER = """6 40.99
6 -154.0
40 5398.01
40 444.93
5 367.0
5 -48.0
5 1376.2
5 148.08
"""


@every_projection
def test_a_batch_does_not_matter_nor_does_what_holds_the_rows(projection: Projection) -> None:
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(8, 6).double()
    take = partial(persample.per_sample, model, lambda y, _: y.square().sum(1))
    whole = take(x).project(projection)
    torch.testing.assert_close(take(x[2:5]).project(projection), whole[2:5])
    torch.testing.assert_close(take(x, hold="graph").project(projection), whole)
    torch.testing.assert_close(take(x, chunk_size=3).project(projection), whole)
    layers = take(x, chunk_size=3).project(projection, per="layer")
    assert isinstance(layers, dict)
    assert list(layers) == ["0", "2"]
    halves = take(x).project(projection, dtype=torch.bfloat16)
    assert isinstance(halves, torch.Tensor)
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.double(), whole, rtol=1e-2, atol=1e-2)


MANY: dict[str, Callable[[int], Projection]] = {
    "kronecker": lambda seed: Kronecker(4, 4, seed=seed),
    "rademacher": lambda seed: Rademacher(16, seed=seed),
    "sjlt": lambda seed: SJLT(16, seed=seed),
    "sjlt of several": lambda seed: SJLT(16, seed=seed, nonzeros=4),
    "mask": lambda seed: Mask(16, seed=seed),
}


@pytest.mark.parametrize("which", MANY)
def test_inner_products_are_right_on_average(which: str) -> None:
    model, x = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4)), torch.randn(4, 2, 6)
    psg = persample.per_sample(model.double(), lambda y, _: y.square().sum(1), x.double())
    grams = []
    for seed in range(400):
        found = psg.project(MANY[which](seed))
        assert isinstance(found, torch.Tensor)
        grams.append(found @ found.T)
    mean, error = torch.stack(grams).mean(0), torch.stack(grams).std(0) / 20
    assert ((mean - psg.gram()).abs() < 5 * error).all()


def test_what_is_chosen_comes_once_and_whole() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(8, 6).double()
    psg = persample.per_sample(model, lambda y, _: y.square().sum(1), x)
    entries = torch.cat([rows.flatten(1) for rows in psg.grads().values()], 1)
    torch.testing.assert_close(psg.project(Mask(entries.shape[1])), entries)
    with pytest.raises(ValueError, match='smaller k, or project with per="total"'):
        psg.project(Mask(20), per="layer")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Kronecker(0, 4), "inp must be a positive number"),
        (lambda: Rademacher(-1), "k must be a positive number of features; got -1"),
        (lambda: SJLT(5, nonzeros=0), "nonzeros must be"),
        (lambda: Mask(True), "k must be"),
    ],
)
def test_sizes_that_are_none(make: Callable[[], Projection], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
