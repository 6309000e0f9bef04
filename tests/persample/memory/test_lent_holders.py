"""A result is written to again once nobody can see it any more, and not before: every way to hold one."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lending import layer, linear, poison, small_results_are_large, warm
from torch import Tensor, nn

from persample import memory

__all__ = ["small_results_are_large"]
pytestmark = pytest.mark.usefixtures("small_results_are_large")

Read = Callable[[], Any]


def holding(taken: Callable[[Tensor], Any]) -> Callable[[Tensor], Read]:
    """Holds what `taken` makes of rows, and nothing else."""

    def hold(rows: Tensor) -> Read:
        view = taken(rows)
        return lambda: view

    return hold


class SumOfSquares(torch.autograd.Function):
    """c Σ rows², whose gradient for c is of the saved rows."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return c * rows.square().sum()

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        return gradient[0] * ctx.saved_tensors[0].square().sum(), None


def in_a_graph(rows: Tensor) -> Read:
    weight = torch.ones_like(rows, requires_grad=True)
    total = (weight * rows).sum()
    return lambda: torch.autograd.grad(total, weight, retain_graph=True)[0]


def in_a_function(rows: Tensor) -> Read:
    c = torch.ones((), dtype=rows.dtype, requires_grad=True)
    value = SumOfSquares.apply(c, rows)
    return lambda: torch.autograd.grad(value, c, retain_graph=True)[0]


def in_an_optimizer(rows: Tensor) -> Read:
    parameter = nn.Parameter(torch.zeros_like(rows))
    parameter.grad = rows
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    return lambda: optimizer.param_groups[0]["params"][0].grad


def in_another_thread(rows: Tensor) -> Read:
    asked, found = threading.Event(), []

    def hold(mine: Tensor) -> None:
        asked.wait(60)
        found.append(mine.clone())

    thread = threading.Thread(target=hold, args=(rows,))
    thread.start()

    def read() -> Tensor:
        asked.set()
        thread.join()
        return found[0]

    return read


def in_a_storage(rows: Tensor) -> Read:
    storage = rows.untyped_storage()
    return lambda: torch.frombuffer(bytearray(storage), dtype=torch.float64).view(4, 7, 5)


def in_a_pointer(rows: Tensor) -> Read:
    pointer = rows.numpy().ctypes.data_as(ctypes.POINTER(ctypes.c_double))  # which holds the array
    return lambda: np.ctypeslib.as_array(pointer, (4, 7, 5))


def in_a_set_tensor(rows: Tensor) -> Read:
    other = torch.empty(0, dtype=rows.dtype).set_(rows.untyped_storage(), 0, rows.shape)
    return lambda: other


def in_a_capsule(rows: Tensor) -> Read:
    capsule = torch.utils.dlpack.to_dlpack(rows)
    return lambda: torch.utils.dlpack.from_dlpack(capsule)


def in_a_memoryview(rows: Tensor) -> Read:
    view = memoryview(rows.numpy())
    return lambda: np.asarray(view)


def in_a_traceback(rows: Tensor) -> Read:
    def fail(mine: Tensor) -> None:
        raise KeyError(mine.shape)

    try:
        fail(rows)
    except KeyError as error:
        caught = error
    return lambda: caught.__traceback__.tb_next.tb_frame.f_locals["mine"]  # type: ignore[union-attr]


HOLDERS: dict[str, tuple[Callable[[Tensor], Read], Callable[[Tensor], Any]]] = {
    name: (holding(taken), taken)
    for name, taken in {
        "itself": lambda rows: rows,
        "slice": lambda rows: rows[2:, 1],
        "last entry": lambda rows: rows[-1, -1, -1],
        "transpose": lambda rows: rows[0].T,
        "other dtype": lambda rows: rows.view(torch.int64),
        "complex": lambda rows: torch.view_as_complex(rows.view(-1, 2)),
        "unbind": lambda rows: rows.unbind()[3],
        "expanded": lambda rows: rows[:, :1].expand(4, 7, 5),
        "as_strided": lambda rows: rows.as_strided((3,), (35,), 35),
        "detached": lambda rows: rows.detach(),
        ".data": lambda rows: rows.data,
        "parameter": lambda rows: nn.Parameter(rows).detach(),
        "numpy": lambda rows: rows.numpy(),
        "numpy slice": lambda rows: rows.numpy()[1:, ::2],
        "from_numpy": lambda rows: torch.from_numpy(rows.numpy()),
        "frombuffer": lambda rows: torch.frombuffer(rows.numpy(), dtype=torch.float64),
        "dlpack tensor": torch.from_dlpack,
        "dlpack array": np.from_dlpack,
        "container": lambda rows: {"rows": [(rows,)]},
    }.items()
} | {
    "graph": (in_a_graph, lambda rows: rows),
    "function": (in_a_function, lambda rows: rows.square().sum()),
    "optimizer": (in_an_optimizer, lambda rows: rows),
    "thread": (in_another_thread, lambda rows: rows),
    "storage": (in_a_storage, lambda rows: rows),
    "pointer": (in_a_pointer, lambda rows: rows.numpy()),
    "set_": (in_a_set_tensor, lambda rows: rows),
    "capsule": (in_a_capsule, lambda rows: rows),
    "memoryview": (in_a_memoryview, lambda rows: rows.numpy()),
    "traceback": (in_a_traceback, lambda rows: rows),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_what_anyone_can_see_is_not_written_to(name: str) -> None:
    hold, of = HOLDERS[name]
    model = layer()
    psg, rows = linear(model)
    address = warm(psg)
    first = psg.grads()["weight"]
    assert first.data_ptr() == address
    read = hold(first)
    del first
    gc.collect()
    assert memory.kept() == 0
    for seed in (1, 2, 3):
        other, expected = linear(model, seed=seed)
        result = other.grads()["weight"]
        assert result.data_ptr() != address
        torch.testing.assert_close(result, expected)
        del result
        poison()
    torch.testing.assert_close(read(), of(rows))
    memory.release()
    del read, other, psg
    gc.collect()
    assert memory.kept() == 0


@pytest.mark.parametrize("name", HOLDERS)
def test_what_nobody_can_see_is_written_to(name: str) -> None:
    psg, rows = linear(layer())
    address = warm(psg)
    read = HOLDERS[name][0](psg.grads()["weight"])
    assert memory.kept() == 0
    if name == "thread":
        read()
    del read
    gc.collect()
    assert poison() == rows.nbytes
    again = psg.grads()["weight"]
    assert again.data_ptr() == address
    torch.testing.assert_close(again, rows)


def saved(rows: Tensor) -> Tensor:
    """Written by torch.save and loaded again."""
    file = io.BytesIO()
    torch.save(rows, file)
    file.seek(0)
    return torch.load(file)


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": Tensor.clone,
    "deepcopy": copy.deepcopy,
    "pickle": lambda rows: pickle.loads(pickle.dumps(rows)),
    "save": saved,
    "storage": lambda rows: torch.empty(0, dtype=rows.dtype).set_(rows.untyped_storage().clone(), 0, rows.shape),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_copies(name: str) -> None:
    psg, rows = linear(layer())
    warm(psg)
    copied = COPIES[name](psg.grads()["weight"])
    gc.collect()
    psg.grads()
    poison()
    torch.testing.assert_close(copied, rows)


def test_rows_moved_to_shared_memory_let_go_of_theirs() -> None:
    psg, rows = linear(layer())
    address = warm(psg)
    shared = psg.grads()["weight"].share_memory_()
    assert shared.is_shared()
    assert poison() == rows.nbytes
    assert psg.grads()["weight"].data_ptr() == address != shared.data_ptr()
    torch.testing.assert_close(shared, rows)


def test_rows_that_are_given_other_memory_let_go_of_theirs() -> None:
    psg, rows = linear(layer())
    warm(psg)
    for change in (lambda result, other: result.set_(other), lambda result, other: setattr(result, "data", other)):
        result = psg.grads()["weight"]
        assert memory.kept() == 0
        change(result, torch.ones(2, dtype=torch.float64))
        assert poison() == rows.nbytes
        assert result.tolist() == [1.0, 1.0]


def test_rows_may_shrink_and_are_refused_to_grow() -> None:
    psg, rows = linear(layer())
    warm(psg)
    result = psg.grads()["weight"]
    result.resize_(2, 7, 5)
    torch.testing.assert_close(result, rows[:2])
    assert memory.kept() == 0
    with pytest.raises(RuntimeError, match="not resizable"):
        result.resize_(40, 7, 5)
    torch.testing.assert_close(psg.grads()["weight"], rows)


def test_a_result_is_a_tensor_as_any_other() -> None:
    psg, _ = linear(layer())
    fresh = psg.grads()["weight"]
    warm(psg)
    reused = psg.grads()["weight"]
    for name in ("dtype", "device", "layout", "requires_grad", "is_leaf", "grad_fn", "_base", "shape"):
        assert getattr(reused, name) == getattr(fresh, name), name
    for name in ("stride", "storage_offset", "is_contiguous", "is_inference", "is_shared", "is_pinned", "_is_view"):
        assert getattr(reused, name)() == getattr(fresh, name)(), name
    assert type(reused) is Tensor


def test_a_result_may_be_written_to_and_differentiated_through() -> None:
    psg, rows = linear(layer())
    warm(psg)
    result = psg.grads()["weight"]
    result.mul_(2.0).requires_grad_()
    result.square().sum().backward()
    torch.testing.assert_close(result.grad, 4 * rows)
    result.grad = None
    del result
    torch.testing.assert_close(psg.grads()["weight"], rows)
