"""Norms, Gram matrices and clipped sums in float32 where positions or uses of a sample nearly cancel."""

import pytest
from fuzz_cancellation import judge


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 1000, 250))
def test_norms_are_as_good_as_those_of_the_loop_and_clipped_sums_keep_their_bound(first):
    faults = [fault for seed in range(first, first + 250) for fault in judge(seed)]
    assert not faults, f"{len(faults)} faults, the first:\n" + "\n".join(faults[:20])
