"""Tests under torch.compile run in a process of their own, without the shape checks of conftest.

Users have none, and Dynamo cannot trace them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parent


def run_without_shape_checks(cases: str, kind: str = "not slow") -> None:
    """Runs the tests of a helper's file that have, or have not, the mark."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider"]
    command += ["-m", kind, str(HELPERS / cases)]
    done = subprocess.run(command, cwd=HELPERS.parents[1], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
