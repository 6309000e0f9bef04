"""The `outputs` backend leaves nothing behind: no tensors, hooks or graph, also between threads."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from convnet import batch, cross_entropy, network
from oracle import loop_grads, rel_err
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import persample


def test_no_growth_and_nothing_left_behind() -> None:
    """200 calls: as many tensors alive after as before, no hook, no gradient, no mode."""
    model, (x, y) = network(), batch()

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(found), Tensor) for found in gc.get_objects())

    for _ in range(3):
        persample.per_sample(model, cross_entropy, x, y).norms()
    before = alive()
    for _ in range(200):
        persample.per_sample(model, cross_entropy, x, y).norms()
    assert alive() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_an_exception_in_the_loss_leaves_the_model_as_it_was() -> None:
    model, (x, y) = network(), batch()

    def broken(_outputs: Tensor, _targets: Tensor) -> Tensor:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        persample.per_sample(model, broken, x, y)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not _get_current_dispatch_mode_stack()
    assert torch.is_grad_enabled()


def test_results_hold_no_graph() -> None:
    model, (x, y) = network(), batch()
    psg = persample.per_sample(model, cross_entropy, x, y)
    results = [psg.losses, psg.norms(), psg.gram(), *psg.grads().values(), *psg.clipped_sum(1.0).values()]
    assert not any(result.requires_grad for result in results)
    assert not any(factor.requires_grad for blocks in psg.blocks.values() for b in blocks for factor in b.factors)


def test_several_threads() -> None:
    model, failures = network().double(), []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(5):
            x = torch.randn(6, 3, 6, 6, generator=generator, dtype=torch.float64)
            y = torch.randint(0, 5, (6,), generator=generator)
            found = persample.per_sample(model, cross_entropy, x, y).grads()
            expected = loop_grads(model, cross_entropy, x, y)
            failures.extend(n for n in expected if rel_err(found[n], expected[n]) > 1e-9)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
