"""The machine that something is measured on: what figures depend on besides the code, and quiet while they come."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Which of the packages are installed, None for those that are not."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def environment(device: str, packages: Iterable[str]) -> dict[str, Any]:
    """What the figures depend on besides the code; names no machine and no user."""
    found = {
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": versions(packages),
    }
    if device.startswith("cuda"):
        found["gpu"], found["cuda"] = torch.cuda.get_device_name(device), torch.version.cuda
    return found


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of other libraries, and no garbage collection in the middle of a step."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if collecting:
            gc.enable()
