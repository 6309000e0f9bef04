"""reweight under torch.compile; the cases are in `reweight_compiled`."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parents[3] / "helpers" / "reweight_compiled.py"


@pytest.mark.parametrize("kind", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_compiled(kind: str) -> None:
    """Without the shape checks of conftest: users have none, and Dynamo cannot trace them."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", "-m", kind, str(CASES)]
    done = subprocess.run(command, cwd=CASES.parents[2], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
