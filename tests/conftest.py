"""What every test runs under: checked shapes, seeds, bounded threads, hypothesis profiles, GPU skips."""

import gc
import os

os.environ.setdefault("MPLBACKEND", "Agg")  # before matplotlib is imported by anything: there is no screen
# Before torch is, for the processes that tests start: threads only wait for each other, with small tensors.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shapes

# Before the packages are imported, or their annotations stay unchecked.
shapes.install("persample", "fngd")

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# torch.manual_seed tells the accelerators too. One that is not there keeps the stack for later, at half a millisecond.
for accelerator in (torch.cuda, torch.xpu, torch.mtia):
    if not accelerator.is_available():
        accelerator._lazy_call = lambda call, **options: None

# No deadline and no complaint about slow examples: the first call of an operation in torch is far slower
# than the next, and so is everything on a loaded machine.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("ci", max_examples=25, derandomize=True, **_common)
settings.register_profile("slow", max_examples=500, **_common)
settings.load_profile("ci")  # --hypothesis-profile=slow overrides it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no GPU, and says so."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Takes modules and ten thousand tests out of the garbage collector's sight: many tests call it, some often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_state_before_and_after() -> Iterator[None]:
    """Seeds torch, with one thread, and fails a test that leaves torch's global state changed for the ones after it.

    The seed is set once a test, not once an example: a property that needs random tensors draws their seed.
    """
    torch.set_num_threads(1)  # commands that a test ran may have set another number
    # torch's own test modules, once imported, forbid to set flags, which Opacus does in a backward pass.
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    torch.manual_seed(0)
    yield
    left = []
    if not torch.is_grad_enabled():
        left.append("gradients switched off")
    if torch.get_default_dtype() != torch.float32:
        left.append(f"default dtype {torch.get_default_dtype()}")
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    assert not left, f"the test left behind: {', '.join(left)}"


@pytest.fixture
def double() -> Iterator[None]:
    """float64 by default: for `pytest.mark.usefixtures("double")`."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
