"""Every backend on every case with every reduction: exact, or refused in words; never wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from capturing import (
    BACKENDS,
    X,
    captured,
    captured_or_refused,
    every_backend,
    moved,
    needs_opacus,
    network,
    squares,
    truth,
)
from oracle import expected, loop_grads, rel_err
from oracle import norms as oracle_norms

import persample
from persample.blocks.types import Dense, Outer
from persample.testing.cases import CASES, Case, find


def in_words(error: Exception) -> bool:
    """Whether an error says what to do."""
    return any(word in str(error) for word in ("backend=", "coupled=", "eval", "out of place", "randomness="))


@needs_opacus
@every_backend
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_exact_or_refused(case: Case, backend: str) -> None:
    if case.coupled and "separable" not in case.tags:
        with pytest.raises(persample.PerSampleError) as refusal:
            captured(case.build(), backend)
        assert in_words(refusal.value)
        return
    psg = captured_or_refused(case, backend)
    if isinstance(psg, persample.PerSampleError):
        assert in_words(psg)
        assert backend != "outputs" or case.coupled, f"refused by outputs: {psg}"
        return
    want, sums = truth(case.name)
    tolerance = 1e-5 if "float32" in case.tags else 1e-9
    close = {
        "grads": (psg.grads(), want),
        "dot": (psg.dot(sums["vectors"]), sums["dot"]),
        "dots": (psg.dot(sums["directions"]), sums["dots"]),
        "weighted_sum": (psg.weighted_sum(sums["c"]), sums["weighted_sum"]),
        "weighted_sum by layer": (psg.weighted_sum(sums["layer_c"]), sums["layer_weighted_sum"]),
    }
    close["sum of squares"] = psg.sum_of_squares(), sums["sum_of_squares"]
    if psg.batch:
        close["variance"] = psg.variance(), sums["variance"]
    other = captured(moved(case), backend)
    for per in ("total", "layer", "param"):
        close[f"gram {per}"] = psg.gram(per), sums["gram", per]
        close[f"cross gram {per}"] = psg.gram(per, other), sums["cross_gram", per]
    for what, (got, right) in close.items():
        assert rel_err(got, right) < tolerance, what
    # a norm is the root of a sum, and the root of rounding is coarser: measured by the largest norm of the batch
    scale = float(sums["norms", "total"].max()) if psg.batch else 1.0
    for per in ("total", "layer", "param"):
        assert rel_err(psg.norms(per), sums["norms", per], floor=max(scale, 1e-12)) < tolerance, per


@needs_opacus
@every_backend
@pytest.mark.parametrize("name", ["usage/tied-weights", "layer/Conv2d(3,2,2)@3,3,7,7", "layer/Embedding(3,5)@4,2,2"])
def test_clipped_sum(name: str, backend: str) -> None:
    want = loop_grads(*find(name).build())
    bound = float(oracle_norms(want).median())
    right = expected(want, max_norm=bound)["clipped_sum"]
    assert rel_err(captured(find(name).build(), backend).clipped_sum(bound), right) < 1e-9


@needs_opacus
@every_backend
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad(backend: str, mode: Callable[[], Any]) -> None:
    model = network()
    right = persample.per_sample(model, squares, X, backend=backend).norms()
    with mode():
        inside = persample.per_sample(model, squares, X, backend=backend).norms()
    torch.testing.assert_close(inside, right)


def test_order_of_preference() -> None:
    assert BACKENDS == ("outputs", "hooks", "vmap", "opacus")


@needs_opacus
@every_backend
def test_blocks_and_losses(backend: str) -> None:
    """Losses are those of the batch, without graph, whatever the backend."""
    model = network()
    psg = persample.per_sample(model, squares, X, backend=backend)
    torch.testing.assert_close(psg.losses, squares(model(X), None).detach())
    assert not psg.losses.requires_grad
    assert {row.parameter for row in psg.explain()} == {name for name, _ in model.named_parameters()}
    assert psg.backend == backend
    assert all(isinstance(block, Dense | Outer) for blocks in psg.blocks.values() for block in blocks)
