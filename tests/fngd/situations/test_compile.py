"""Under torch.compile a run is the same as without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMPILED = Path(__file__).parents[2] / "helpers" / "fngd_compiled.py"


@pytest.mark.parametrize("kind", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_torch_compile(kind: str) -> None:
    """Without the shape checks of conftest: users have none, and Dynamo cannot trace them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--noconftest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        kind,
        str(COMPILED),
    ]
    done = subprocess.run(command, cwd=COMPILED.parents[2], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
