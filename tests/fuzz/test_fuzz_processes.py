"""Two gloo processes: per-sample gradients under DDP and FSDP, exact or refused; the global Gram matrix."""

import fuzz_processes as fuzz
import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_per_sample_gradients_of_a_wrapped_model_are_exact_or_refused(kind):
    for result in fuzz.together(fuzz.per_sample_job, kind):
        assert isinstance(result, tuple), result
        faults, counts = result
        assert not faults, f"{counts}, {len(faults)} faults, the first:\n" + "\n".join(faults[:10])
        assert counts["exact"] or kind != "DDP"


def test_the_global_gram_matrix_is_that_of_the_joined_batch_whatever_branches_run():
    seeds = list(range(24))
    results = fuzz.together(fuzz.global_gram_job, seeds)
    for rank, found in enumerate(results):
        assert isinstance(found, dict), f"rank {rank}: {found}"
    for seed in seeds:
        refused = [isinstance(found[seed], str) for found in results]
        assert all(refused) or not any(refused), f"seed {seed}: one process alone refuses"
        if refused[0]:
            continue
        for name, theirs in fuzz.global_gram_truth(seed).items():
            for found in results:
                torch.testing.assert_close(found[seed][name], theirs, rtol=1e-7, atol=1e-10, msg=f"seed {seed} {name}")
