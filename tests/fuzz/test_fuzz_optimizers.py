"""Training runs of every optimiser beside dense oracles, and `reweight` beside the loop."""

import pytest
from fuzz_reweight import judge
from fuzz_training import run


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 256, 64))
def test_steps_are_those_of_explicit_matrices(first):
    runs = [run(seed) for seed in range(first, first + 64)]
    faults = [fault for _, fault in runs if fault]
    assert not faults, f"{len(faults)} faults, the first:\n" + "\n".join(faults[:10])
    assert sum(steps for steps, _ in runs) == 64 * 8


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 1200, 300))
def test_reweighted_gradients_are_those_of_the_loop(first):
    faults = [fault for seed in range(first, first + 300) for fault in judge(seed)]
    assert not faults, f"{len(faults)} faults, the first:\n" + "\n".join(faults[:10])
