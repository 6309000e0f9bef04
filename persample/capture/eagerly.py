"""Captures run outside of torch.compile: a compiled graph no longer has the operations whose rules are applied."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class _Stance:
    """That of torch.compile is the whole process's: eager from the first thread that captures to the last."""

    def __init__(self) -> None:
        self._lock, self._threads = threading.Lock(), 0

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Compiled functions run as plain Python."""
        with self._lock:
            if not self._threads:
                self._set = torch.compiler.set_stance("force_eager")
            self._threads += 1
        try:
            yield
        finally:
            with self._lock:
                self._threads -= 1
                if not self._threads:
                    self._set.__exit__(None, None, None)


_STANCE = _Stance()


def eagerly(function: Callable[P, R]) -> Callable[P, R]:
    """Returns the function; what it calls that is compiled runs as plain Python."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _STANCE.eager():
            return function(*args, **kwargs)

    return run
