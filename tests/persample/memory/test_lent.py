"""What is kept, for how long, and when it is written to again."""

from __future__ import annotations

import gc
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lending import layer, linear, poison, small_results_are_large, warm
from torch import Tensor, nn

import persample
from persample import memory
from persample.memory import pool as lent

__all__ = ["small_results_are_large"]
pytestmark = pytest.mark.usefixtures("small_results_are_large")


def test_one_call_keeps_nothing_two_keep_one_result_and_the_third_is_written_there() -> None:
    psg, rows = linear(layer())
    psg.grads()
    assert memory.kept() == 0
    second = psg.grads()["weight"]
    address = second.data_ptr()
    assert memory.kept() == 0
    del second
    assert poison() == rows.nbytes
    third = psg.grads()["weight"]
    assert third.data_ptr() == address
    assert third.is_contiguous()
    assert third.data_ptr() % 64 == 0
    assert third.untyped_storage().nbytes() == rows.nbytes
    assert memory.kept() == 0
    torch.testing.assert_close(third, rows)


def test_a_loop_that_rebinds_its_result_alternates_between_two_blocks() -> None:
    psg, rows = linear(layer())
    addresses = set()
    result = psg.grads()
    result = psg.grads()
    for _ in range(6):
        result = psg.grads()
        addresses.add(result["weight"].data_ptr())
        torch.testing.assert_close(result["weight"], rows)
    assert len(addresses) == 2
    assert memory.kept() == rows.nbytes


def test_many_results_let_go_of_at_once_leave_one_block() -> None:
    psg, rows = linear(layer())
    results = [psg.grads()["weight"] for _ in range(5)]
    assert len({result.data_ptr() for result in results}) == 5
    for result in results:
        torch.testing.assert_close(result, rows)
    del result
    results.clear()
    assert memory.kept() == rows.nbytes


def test_smaller_batches_share_a_block_and_much_smaller_ones_do_not() -> None:
    model = layer()
    whole, part, tiny = (linear(model, batch, batch) for batch in (8, 5, 3))
    address = warm(whole[0])
    for psg, rows in (part, whole, part):
        result = psg.grads()["weight"]
        assert result.data_ptr() == address
        assert result.untyped_storage().nbytes() == rows.nbytes
        torch.testing.assert_close(result, rows)
        del result
        assert poison() == whole[1].nbytes
    for psg, kept in ((tiny[0], 3), (tiny[0], 3), (whole[0], 0)):  # 3 is like 5, but 8 is too much for it
        psg.grads()
        assert poison() == kept * whole[1][0].nbytes


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3), st.booleans()), max_size=25))
def test_whatever_is_held_stays_as_it_was(calls: list[tuple[int, int, bool]]) -> None:
    """Batches of all sizes, whose results are held, wholly or in part, or let go of in any order."""
    memory.release()
    model = layer()
    held: list[tuple[Any, Tensor]] = []
    for seed, (batch, drops, in_part) in enumerate(calls):
        psg, rows = linear(model, batch, seed)
        result = psg.grads()["weight"]
        torch.testing.assert_close(result, rows)
        taken = slice(batch - 1, None) if in_part else slice(None)
        held.append((result[taken].numpy(), rows[taken].clone()))
        del result
        for _ in range(min(drops, len(held))):
            held.pop(seed * 7 % len(held))
        assert poison() <= lent.ALIKE * rows.nbytes
        for view, expected in held:
            torch.testing.assert_close(torch.from_numpy(view), expected)


def test_what_is_kept_goes_with_the_parameter() -> None:
    model = layer()
    psg, rows = linear(model)
    warm(psg)
    result = psg.grads()["weight"]
    other = psg.grads()
    del other
    assert memory.kept() == rows.nbytes
    del psg, model
    gc.collect()
    assert memory.kept() == 0
    assert not lent._slots
    torch.testing.assert_close(result, rows)
    del result
    assert memory.kept() == 0


def test_release_gives_back_and_reuse_can_be_switched_off() -> None:
    psg, rows = linear(layer())
    warm(psg)
    held = psg.grads()["weight"]
    memory.release()
    torch.testing.assert_close(held, rows)
    del held
    assert memory.kept() == 0
    warm(psg)
    assert memory.reuse(False) is True
    assert memory.kept() == 0
    for _ in range(3):
        torch.testing.assert_close(psg.grads()["weight"], rows)
        assert memory.kept() == 0
    assert memory.reuse(True) is False
    warm(psg)


def test_all_blocks_together_take_no_more_than_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = linear(layer()), linear(layer(), seed=1)
    monkeypatch.setattr(lent, "most", lambda: one[1].nbytes)
    warm(one[0])
    for _ in range(3):
        torch.testing.assert_close(other[0].grads()["weight"], other[1])
        assert memory.kept() == one[1].nbytes
    monkeypatch.setattr(lent, "most", lambda: 0)
    for _ in range(3):
        assert one[0].grads()["weight"].data_ptr()


def test_the_share_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limits = [tmp_path / name for name in ("max", "limit", "none")]
    limits[0].write_text("max\n")
    limits[1].write_text("8000\n")
    monkeypatch.setattr(lent, "_LIMITS", tuple(map(str, limits)))
    lent.most.cache_clear()
    try:
        assert lent.most() == 8000 // lent.SHARE
        limits[1].unlink()
        lent.most.cache_clear()
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert lent.most() == machine // lent.SHARE
    finally:
        lent.most.cache_clear()


def test_a_call_that_fails_half_way_leaves_nothing_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(layer(), nn.Linear(7, 3, bias=False).double())
    psg = persample.per_sample(model, lambda y, _: y.square().sum(1), torch.randn(4, 5).double())
    before = psg.grads()
    psg.grads()
    kept = poison()
    last = psg._gradients["1.weight"]  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        patch.setattr(type(last), "materialise", fails_for(last))
        with pytest.raises(MemoryError, match="on purpose"):
            psg.grads()
    gc.collect()
    assert poison() == kept
    torch.testing.assert_close(psg.grads(), before)


def fails_for(gradient: Any) -> Any:
    """`Gradient.materialise` that fails for one parameter."""
    whole = type(gradient).materialise

    def materialise(self: Any, out: Tensor | None = None) -> Tensor:
        if self is gradient:
            raise MemoryError("on purpose")
        return whole(self, out)

    return materialise


def test_no_memory_to_lend_is_for_torch_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    psg, rows = linear(layer())

    def refuses(*_: object, **__: object) -> None:
        raise OSError("cannot allocate memory")

    monkeypatch.setattr(lent.mmap, "mmap", refuses)
    for _ in range(3):
        torch.testing.assert_close(psg.grads()["weight"], rows)
    monkeypatch.setattr(lent, "_PRIVATE", 0)
    assert memory.rows(psg._parameters["weight"], 4, torch.float64) is None


def test_threads_never_share_a_block() -> None:
    """All ask for the same parameter's rows, hold some for a while, and find them as they left them."""
    parameter = nn.Parameter(torch.zeros(64, dtype=torch.float64))
    start = threading.Barrier(4)

    def work(number: int) -> int:
        start.wait()
        held: list[tuple[Tensor, float]] = []
        reused = 0
        for call in range(150):
            rows = memory.rows(parameter, 8, torch.float64)
            if rows is not None:
                reused += 1
                held.append((rows.fill_(number + 10.0 * call), number + 10.0 * call))
            if len(held) > (number + call) % 3:
                found, value = held.pop(0)
                assert bool((found == value).all())
        assert all(bool((found == value).all()) for found, value in held)
        return reused

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) > 500
    assert memory.kept() == parameter.nbytes * 8


def test_a_block_too_small_that_another_thread_gave_back_is_not_taken() -> None:
    """Between one thread's change of size and another's return there is no lock."""
    psg, rows = linear(layer())
    warm(psg)
    (slot,) = lent._slots.values()
    slot.free.append(mmap.mmap(-1, rows.nbytes // 2))
    torch.testing.assert_close(psg.grads()["weight"], rows)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_starts_with_nothing_and_leaves_its_parent_alone() -> None:
    psg, rows = linear(layer())
    warm(psg)
    held = psg.grads()["weight"]
    psg.grads()
    kept = memory.kept()
    child = os.fork()
    if child == 0:  # no assert: an exception would run the rest of the tests twice
        right = memory.kept() == 0 and torch.equal(held, rows)
        for _ in range(4):
            found = memory.rows(psg._parameters["weight"], 4, torch.float64)
            right = right and (found is None or found.data_ptr() != held.data_ptr())
            found = None if found is None else found.fill_(3.0)
        held.fill_(5.0)
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert memory.kept() == kept == rows.nbytes
    torch.testing.assert_close(held, rows)
    torch.testing.assert_close(psg.grads()["weight"], rows)
