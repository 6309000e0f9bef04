"""reweight under torch.compile; the cases are in `reweight_compiled`."""

import pytest
from compiled_process import run_without_shape_checks


@pytest.mark.parametrize("kind", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_compiled(kind: str) -> None:
    run_without_shape_checks("reweight_compiled.py", kind)
