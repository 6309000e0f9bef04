"""Under torch.compile a run is the same as without; the cases are in `fngd_compiled`."""

import pytest
from compiled_process import run_without_shape_checks


@pytest.mark.parametrize("kind", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_torch_compile(kind: str) -> None:
    run_without_shape_checks("fngd_compiled.py", kind)
