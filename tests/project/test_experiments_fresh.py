"""A function in a fresh process: its result, its progress, what it raises, and how it is ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch

from experiments.fresh import Show, in_fresh_process
from experiments.record import Stopped


def _work(how: str, show: Show) -> tuple[int, int]:
    show(1, 2, "half")
    if how == "raise":
        raise ValueError("no such thing")
    if how == "die":
        os._exit(3)
    while how == "last":
        time.sleep(1)
    return os.getpid(), torch.get_num_threads()


def _stop(*_: object) -> None:
    raise Stopped


def test_it_returns_what_the_function_does_and_tells_how_far_it_is():
    seen: list[tuple[float, float, str]] = []
    process, threads = in_fresh_process(_work, "return", show=lambda *progress: seen.append(progress))
    assert seen == [(1, 2, "half")]
    assert process != os.getpid()
    assert threads == torch.get_num_threads()


@pytest.mark.parametrize(
    ("how", "show", "kind", "words"),
    [
        ("raise", lambda *_: None, ValueError, "no such thing"),
        ("die", lambda *_: None, RuntimeError, "_work has died, exit code 3"),
        ("last", _stop, Stopped, None),
    ],
)
def test_what_ends_it_passes_on(how: str, show: Callable[..., None], kind: type[Exception], words: str | None):
    with pytest.raises(kind, match=words):
        in_fresh_process(_work, how, show=show)
