"""Huge pages are advice: the same values with and without, and nothing asked of tensors that have no memory."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from persample import memory
from persample.blocks.reductions import materialise
from persample.blocks.types import Outer
from persample.memory import advise, empty, huge_pages


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    calls: list[tuple[int, int, int]] = []

    def madvise(start: int, length: int, advice: int) -> int:
        calls.append((start, length, advice))
        return -1  # refused

    monkeypatch.setattr(memory, "_madvise", lambda: madvise)
    monkeypatch.setattr(memory, "SMALLEST", 2**14)
    monkeypatch.setattr(memory, "_wanted", True)
    return calls


def test_only_whole_pages_inside_the_tensor_are_asked_for(asked: list[tuple[int, int, int]]) -> None:
    tensor = empty((3, 5000), torch.zeros(1, dtype=torch.float64))
    [(start, length, advice)] = asked
    assert tensor.shape == (3, 5000)
    assert tensor.dtype == torch.float64
    assert advice == 14
    assert start % memory.PAGESIZE == length % memory.PAGESIZE == 0
    assert tensor.data_ptr() <= start < tensor.data_ptr() + memory.PAGESIZE
    end = tensor.data_ptr() + tensor.nbytes
    assert end - memory.PAGESIZE < start + length <= end


def test_small_and_fake_tensors_are_left_alone(asked: list[tuple[int, int, int]]) -> None:
    empty((10,), torch.zeros(1))
    with FakeTensorMode():
        advise(torch.empty(10**6))
    advise(torch.empty(10**6, device="meta"))
    assert asked == []


@pytest.mark.parametrize("time", [1, 3])
def test_rows_in_advised_memory_are_the_rows(asked: list[tuple[int, int, int]], time: int) -> None:
    x, z = torch.randn(4, time, 30, requires_grad=True), torch.randn(4, time, 40)
    rows = materialise(Outer(x, z))
    assert len(asked) == 1
    torch.testing.assert_close(rows, torch.einsum("bto,bti->boi", z, x.detach()))


def test_a_system_without_madvise_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    memory._madvise.cache_clear()
    monkeypatch.setattr(memory, "_wanted", True)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: (_ for _ in ()).throw(OSError("no C library")))
    try:
        assert memory._madvise() is None
        assert empty((2 * memory.SMALLEST,), torch.zeros(1)).numel() == 2 * memory.SMALLEST
    finally:
        memory._madvise.cache_clear()


def test_nothing_is_asked_for_unless_wanted(asked: list[tuple[int, int, int]]) -> None:
    assert huge_pages(False) is True
    empty((10**6,), torch.zeros(1))
    assert asked == []
    assert huge_pages(True) is False
    empty((10**6,), torch.zeros(1))
    assert len(asked) == 1


def test_huge_pages_are_off_by_default() -> None:
    assert memory._wanted is False
