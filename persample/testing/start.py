"""Before torch is imported: the version, which torch is needed, and command lines that answer at once.

Importing torch takes seconds. `python -m persample` and the other commands import our packages before they read a word
of the command line, so each `__init__` asks `deferred` whether to wait with all that needs torch. Once the options are
known to be right, the command calls `complete`.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from importlib.util import find_spec

VERSION = "0.1.0"
"""Of the distribution `persample`, which brings both packages; pyproject.toml reads it from here."""
OLDEST_TORCH = (2, 8)
"""The first torch whose functions are all there; pyproject.toml asks for the same."""
COMMANDS = ("persample", "fngd", "benchmarks", "experiments")

_waiting: list[str] = []
_finished: list[bool] = []


def deferred(package: str) -> bool:
    """Returns whether a package's `__init__` leaves its names to `complete`: while one of our commands starts.

    That is so from the first import in `python -m COMMAND …` on until the command calls `complete`. `sys.orig_argv`
    ends with the command and its words, as many as `sys.argv` has; before them is `-m`, alone or after other letters.
    """
    before, named = ["", "", *sys.orig_argv][-len(sys.argv) - 1 :][:2] if sys.argv else ("", "")
    starts = not _finished and named in COMMANDS and before.startswith("-") and before.endswith("m")
    if starts:
        _waiting.append(package)
    return starts


def complete() -> None:
    """Imports what `deferred` packages have left out."""
    _finished.append(True)
    packages = _waiting.copy()
    _waiting.clear()
    for package in packages:
        importlib.reload(sys.modules[package])


def check_torch(found: str | None = None) -> None:
    """Raises ImportError where torch, or a version `found` of it, is older than what the packages use.

    >>> check_torch("2.13.0+cpu")
    """
    if found is None:
        import torch

        found = torch.__version__
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"persample {VERSION} needs torch {oldest} or newer, and this is torch {found}: "
            f"pip install --upgrade 'torch>={oldest}'"
        )


def add_version(parser: argparse.ArgumentParser, package: str) -> None:
    """Adds `--version`."""
    words = f"{package} {VERSION}" + ("" if package == "persample" else ", part of the distribution persample")
    parser.add_argument("--version", action="version", version=words, help="print the version and stop")


def check_installed(*modules: str) -> None:
    """Raises ValueError, with the command that installs them, where modules that a command needs are not there."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise ValueError(f"{names}: not installed, and needed here: pip install {names}")
