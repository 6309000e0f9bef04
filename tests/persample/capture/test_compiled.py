"""per_sample and torch.compile; the cases are in `capture_compiled`."""

from compiled_process import run_without_shape_checks


def test_compiled() -> None:
    run_without_shape_checks("capture_compiled.py")
