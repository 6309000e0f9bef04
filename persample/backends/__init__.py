"""Backends: ways to capture the blocks of a batch, interchangeable and validated against each other.

A backend is a function from a `Problem` to a `Capture`. `BACKENDS` holds them in order of preference; dispatch,
error messages and documentation are made from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from persample.capture.types import Capture, Captured, Problem


@dataclass(frozen=True)
class Backend:
    """A registered backend."""

    name: str
    capture: Callable[[Problem], Capture]
    covers: str
    requires: str | None = None
    """Name of an optional package."""


BACKENDS: dict[str, Backend] = {}


def register(name: str, *, covers: str, requires: str | None = None) -> Callable[[Any], Any]:
    """Registers a capture function as a backend."""

    def add(function: Callable[[Problem], Capture]) -> Callable[[Problem], Capture]:
        BACKENDS[name] = Backend(name, function, covers, requires)
        return function

    return add


def _load() -> None:
    """Imports the modules that register backends, in order of preference."""
    from importlib import import_module

    for name in ("outputs", "hooks", "vmap", "opacus"):
        import_module(f"{__name__}.{name}")


_load()
from persample.backends.losses import capture_losses  # noqa: E402
from persample.backends.shared import buffers_kept, check_rows  # noqa: E402
from persample.capture.sum_check import check_losses  # noqa: E402

__all__ = [
    "BACKENDS",
    "Backend",
    "Capture",
    "Captured",
    "Problem",
    "buffers_kept",
    "capture_losses",
    "check_losses",
    "check_rows",
    "register",
]
