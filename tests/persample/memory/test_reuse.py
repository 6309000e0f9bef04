"""`grads()` in reused memory: every kind of block writes its rows in full, and where memory has to be fresh it is."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from mmap import PAGESIZE
from pathlib import Path

import pytest
import torch
from lending import layer, linear, poison, small_results_are_large, warm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import persample
from persample import memory
from persample.blocks.reductions import materialise, overwrites
from persample.blocks.types import Conv, Dense, Outer, Pulled, Rows
from persample.memory import pool
from persample.testing.cases import CASES, Case

__all__ = ["small_results_are_large"]
pytestmark = pytest.mark.usefixtures("small_results_are_large")

EXACT = [case for case in CASES if not case.coupled]


def kind(rows: Tensor) -> tuple[torch.dtype, list[int]]:
    """Precision and strides, those of axes of one entry left out, which mean nothing."""
    return rows.dtype, [step for size, step in zip(rows.shape, rows.stride(), strict=True) if size > 1]


def rows_again(case: Case, hold: str) -> None:
    """Compares fresh rows with those of later calls, before which all that is kept is overwritten."""
    model, loss_fn, inputs, targets = case.build()
    psg = persample.per_sample(model, loss_fn, inputs, targets, hold=hold)
    fresh = psg.grads()
    kinds = {name: kind(rows) for name, rows in fresh.items()}
    for _ in range(2):
        poison()
        again = psg.grads()
        torch.testing.assert_close(again, fresh, rtol=1e-5 if "float32" in case.tags else 1e-12, atol=1e-12)
        assert {name: kind(rows) for name, rows in again.items()} == kinds
        del again


@pytest.mark.parametrize("case", EXACT[::6], ids=lambda case: case.name)
def test_rows_are_written_in_full(case: Case) -> None:
    rows_again(case, "factors")


@pytest.mark.slow
@pytest.mark.parametrize("hold", ["factors", "graph"])
@pytest.mark.parametrize("case", [case for case in EXACT if "checkpointed" not in case.name], ids=lambda c: c.name)
def test_rows_of_every_case_are_written_in_full(case: Case, hold: str) -> None:
    rows_again(case, hold)


def test_half_precision_is_accumulated_in_reused_memory() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Conv1d(1, 2, 3)).bfloat16()
    x = torch.randn(4, 6).bfloat16()
    psg = persample.per_sample(model, lambda y, _: y.float().square().sum((1, 2)), x[:, None])
    fresh = psg.grads()
    for _ in range(2):
        poison()
        again = psg.grads()
        assert all(rows.dtype == torch.float32 for rows in again.values())
        torch.testing.assert_close(again, fresh, rtol=0, atol=0)
        del again


def test_rows_of_any_precision_share_the_memory_of_a_parameter() -> None:
    parameter = nn.Parameter(torch.zeros(6))
    addresses = set()
    for dtype in (torch.float32, torch.float64, torch.complex64, torch.float32, torch.float64):
        found = memory.rows(parameter, 4, dtype)
        if found is not None:  # all but the first
            assert found.dtype == dtype
            assert bool((found.fill_(1.0) == 1).all())
            addresses.add(found.data_ptr())
            del found
    assert len(addresses) == 1


def test_chunks_write_their_rows_into_one_result() -> None:
    model = nn.Linear(5, 7).double()
    x = torch.randn(10, 5).double()

    def formed() -> dict[str, Tensor]:
        return persample.per_sample(model, lambda y, _: y.square().sum(1), x, chunk_size=4).grads()

    whole = persample.per_sample(model, lambda y, _: y.square().sum(1), x).grads()
    memory.release()
    formed()
    address = formed()["weight"].data_ptr()
    assert poison() == sum(rows.nbytes for rows in whole.values())
    again = formed()
    assert again["weight"].data_ptr() == address
    torch.testing.assert_close(again, whole)


def test_grad_reuses_memory_and_so_does_a_held_graph() -> None:
    model = layer()
    x = torch.randn(4, 5).double()

    def formed(graph: bool) -> Tensor:
        if graph:
            return persample.per_sample(model, lambda y, _: y.square().sum(1), x, hold="graph").grads()["weight"]
        return persample.grad(model(x).square().sum(1), model.weight)[0]

    expected = formed(graph=False).clone()
    address = formed(graph=True).data_ptr()
    for graph in (False, True, False):
        assert poison() == expected.nbytes
        found = formed(graph)
        assert found.data_ptr() == address
        torch.testing.assert_close(found, expected)
        del found


def test_buffers_of_the_caller_are_left_to_the_caller() -> None:
    psg, rows = linear(layer())
    warm(psg)
    kept = memory.kept()
    mine = torch.zeros_like(rows)
    assert psg.grads(out={"weight": mine})["weight"].data_ptr() == mine.data_ptr()
    torch.testing.assert_close(mine, rows)
    assert memory.kept() == kept
    reused = psg.grads()
    assert psg.grads(out=reused)["weight"].data_ptr() == reused["weight"].data_ptr()


def test_other_quantities_neither_keep_nor_take_memory() -> None:
    psg, _ = linear(layer(), batch=9)
    for _ in range(3):
        results = psg.norms(), psg.gram(), psg.weighted_sum(torch.ones(9).double()), psg.clipped_sum(1.0)
        assert memory.kept() == 0
        assert not pool._slots
    warm(psg)
    kept = memory.kept()
    results = psg.norms(), psg.gram(), psg.clipped_sum(1.0)
    assert memory.kept() == kept
    del results


def test_an_inference_tensor_leaves_memory_for_ordinary_ones() -> None:
    psg, rows = linear(layer())
    address = warm(psg)
    with torch.inference_mode():
        found = psg.grads()["weight"]
    assert found.is_inference()
    assert found.data_ptr() == address
    torch.testing.assert_close(found, rows)
    del found
    poison()
    again = psg.grads()["weight"].add_(1.0)
    assert not again.is_inference()
    assert again.data_ptr() == address
    torch.testing.assert_close(again, rows + 1)


class Special(nn.Parameter):
    """Of which nobody knows where its rows lie."""


def test_memory_is_fresh_where_another_is_not_to_be_had() -> None:
    parameter = nn.Parameter(torch.zeros(64))

    def found(given: Tensor = parameter) -> bool:
        return [memory.rows(given, 2, torch.float32) is not None for _ in range(2)][1]

    assert found()
    assert not found(nn.Parameter(torch.zeros(64, device="meta")))
    assert not found(Special(torch.zeros(64)))
    with FakeTensorMode() as mode:
        assert not found()
        assert not found(mode.from_tensor(torch.zeros(64)))
    with FlopCounterMode(display=False):
        assert not found()
    taken: list[bool] = []
    torch.func.vmap(lambda x: (taken.append(found()), x)[1])(torch.ones(2))
    assert taken == [False]
    torch.use_deterministic_algorithms(True)
    try:
        assert not found()
    finally:
        torch.use_deterministic_algorithms(False)
    assert found()


def test_small_results_are_left_to_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    psg, rows = linear(layer())
    monkeypatch.setattr(memory, "SMALLEST", rows.nbytes + 1)
    for _ in range(3):
        psg.grads()
    assert not pool._slots
    monkeypatch.setattr(memory, "SMALLEST", rows.nbytes)
    warm(psg)


def test_which_rows_may_lie_in_memory_used_before() -> None:
    x, z = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    assert overwrites(Outer(x, z))
    assert not overwrites(Outer(x, z.double()))
    assert overwrites(Outer(x.bfloat16(), z))
    assert overwrites(Dense(x))
    assert not overwrites(Dense(x.mT))
    assert not overwrites(Pulled(Dense(x), lambda rows: rows.mT, (4, 3), True))
    indices = torch.zeros(2, 3, dtype=torch.long)
    assert overwrites(Rows(indices, z, 100))
    assert not overwrites(Rows(indices, z, 10_000))  # most of whose pages nobody touches
    convolution = persample.per_sample(nn.Conv1d(2, 3, 3), lambda y, _: y.sum((1, 2)), torch.randn(4, 2, 9))
    (block,) = convolution.blocks["weight"]
    assert isinstance(block, Conv)
    assert overwrites(block)


@pytest.mark.gpu
def test_a_cuda_device_keeps_memory_by_itself() -> None:
    model = nn.Linear(64, 64).cuda()
    x = torch.randn(8, 64, device="cuda")
    for _ in range(3):
        rows = persample.per_sample(model, lambda y, _: y.square().sum(1), x).grads()
        assert rows["weight"].is_cuda
        del rows
    assert not pool._slots


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux alone tells what lies in memory")
def test_zeros_of_which_little_is_written_take_little_memory() -> None:
    """A table of 16 MiB a sample, of which 3 rows are written."""
    z = torch.randn(2, 3, 64)
    indices = torch.tensor([[5, 5, 0], [2**16 - 1, 7, 9]])
    block = Rows(indices, z, 2**16)
    before = resident()
    rows = materialise(block)
    assert resident() - before < rows.nbytes / 4
    expected = torch.zeros(2, 2**16, 64)
    for b, t in product(range(2), range(3)):
        expected[b, indices[b, t]] += z[b, t]
    torch.testing.assert_close(rows, expected)
    assert not rows._is_view()
    memory.reuse(False)
    torch.testing.assert_close(materialise(block), expected)


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGESIZE


def test_zeros_are_torchs_where_there_are_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(1, dtype=torch.float64)
    assert memory.zeros((0, 3), like).shape == (0, 3)
    assert memory.zeros((2, 3), torch.zeros(1, device="meta")).is_meta
    for _ in range(2):
        found = memory.zeros((2, 3), like)
        assert found.tolist() == [[0.0] * 3] * 2
        assert found.dtype == torch.float64
        monkeypatch.setattr(pool.mmap, "mmap", refuses)


def refuses(*_: object, **__: object) -> None:
    raise OSError("cannot allocate memory")


AT_THE_END = """
import threading, torch, persample
from persample import memory
memory.SMALLEST = 1
model = torch.nn.Linear(5, 7)
psg = persample.per_sample(model, lambda y, _: y.square().sum(1), torch.randn(4, 5))
held = [psg.grads() for _ in range(4)]
held.pop()
cycle = [held]
cycle.append(cycle)
loss = (held[-1]["weight"] * torch.ones(7, 5, requires_grad=True)).sum()
print(memory.kept() > 0)
"""


def test_a_process_ends_in_peace_with_results_lent() -> None:
    done = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
