"""The case table itself: cases build alike each time, loops are right, and they couple if they say so."""

from __future__ import annotations

import contextlib

import module_db
import pytest
import strategies
import torch
from hypothesis import given
from oracle import (
    clipped_sum,
    dot,
    expected,
    gram,
    isolated_grads,
    loop_grads,
    norms,
    rel_err,
    trainable,
    weighted_sum,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves

from persample.testing.cases import CASES, Case, call, find, select

TAGS = {
    *(
        "layer",
        "usage",
        "architecture",
        "peers",
        "random",
        "stateful",
        "separable",
        "empty",
        "zero",
        "unused",
    ),
    *("complex", "float32", "routing", "time-major"),
}


every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def losses_of(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a new build, and the gradients of another."""
    model, loss_fn, inputs, targets = case.build()
    torch.manual_seed(1)
    losses = loss_fn(call(model, inputs), targets)
    torch.manual_seed(1)
    return losses, loop_grads(*case.build())


@every_case
def test_builds_a_float64_model_with_one_loss_per_sample(case: Case) -> None:
    losses, grads = losses_of(case)
    assert losses.dim() == 1
    assert losses.dtype == torch.float64
    assert losses.isfinite().all()
    assert (len(losses) == 0) == ("empty" in case.tags)
    assert grads
    for name, g in grads.items():
        assert g.dtype in (torch.float64, torch.complex128), name
        assert g.isfinite().all(), name
        assert len(g) == len(losses)
    assert any(g.is_complex() for g in grads.values()) == ("complex" in case.tags)
    some = any(g.abs().max() > 1e-6 for g in grads.values() if g.numel())
    assert some != bool({"empty", "zero"} & case.tags)


@every_case
def test_rows_sum_to_the_gradient_of_the_batch(case: Case) -> None:
    """The identity that the library checks at run time holds for the definition, coupled or not."""
    losses, grads = losses_of(case)
    model, loss_fn, inputs, targets = case.build()
    torch.manual_seed(1)
    loss_fn(call(model, inputs), targets).sum().backward()
    whole = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainable(model).items()}
    whole = {n: g.to_dense() if g.is_sparse else g for n, g in whole.items()}
    # Measured by the rows: losses that always add up to one have a batch gradient of zero, so nothing is left
    # of it but rounding.
    scale = max((float(g.abs().max()) for g in grads.values() if g.numel()), default=0.0)
    error = rel_err(weighted_sum(grads, torch.ones_like(losses)), whole, floor=max(scale, 1e-12))
    assert error < (1e-5 if "float32" in case.tags else 1e-9)


@every_case
def test_builds_alike_and_leaves_no_trace(case: Case) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second = case.build(), case.build()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    a, b = (tree_leaves([dict(m.state_dict()), x, y]) for m, _, x, y in (first, second))
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True) if isinstance(s, Tensor))
    assert all(p.grad is None for p in first[0].parameters())


@pytest.mark.parametrize("case", select(lacking=["stateful"], coupled=False), ids=lambda c: c.name)
def test_loop_agrees_with_samples_run_alone(case: Case) -> None:
    """Two definitions of the per-sample gradient are one where samples do not interact."""
    if not case.sliceable:
        pytest.skip("a sample cannot be run alone, or not with the same result")
    built = case.build()
    error = rel_err(loop_grads(*built), isolated_grads(case, *built))
    assert error < (1e-5 if "float32" in case.tags else 1e-9)


@pytest.mark.parametrize("case", select(coupled=True), ids=lambda c: c.name)
def test_coupled_cases_couple(case: Case) -> None:
    """A loss depends on the input of another sample, or a gradient on the presence of another sample."""
    model, loss_fn, inputs, targets = case.build()
    grads = loop_grads(model, loss_fn, inputs, targets)
    if case.sliceable:
        # BatchNorm refuses a single value per channel, which is coupling enough.
        with contextlib.suppress(ValueError):
            assert rel_err(grads, isolated_grads(case, model, loss_fn, inputs, targets)) > 1e-6
            return
    x = inputs[0] if isinstance(inputs, tuple) else inputs
    first = loss_fn(call(model, inputs), targets)[0]
    changed = x.clone()
    changed[-1] += 1
    inputs = (changed, *inputs[1:]) if isinstance(inputs, tuple) else changed
    assert abs(first - loss_fn(call(model, inputs), targets)[0]) > 1e-9


def test_separable_means_coupled() -> None:
    assert all(c.coupled for c in select(having=["separable"]))


def test_tags_are_the_documented_ones() -> None:
    assert {t for c in CASES for t in c.tags} == TAGS


def test_names_are_unique_and_found() -> None:
    assert len({c.name for c in CASES}) == len(CASES) > 200
    assert find("usage/tied-weights").note == "Two layers with one weight."
    with pytest.raises(KeyError, match="similar: usage/tied-weights"):
        find("tied-w")


@pytest.mark.parametrize("name", ["usage/tied-weights", "architecture/fourier-operator"])
def test_reductions_of_the_oracle_agree_with_one_long_vector(name: str) -> None:
    """Norms, products and sums written once more, one sample at a time."""
    grads = loop_grads(*find(name).build())
    want = expected(grads, other=grads)

    def flat(tree: dict[str, Tensor], b: int | None = None) -> Tensor:
        parts = [tree[n] if b is None else tree[n][b] for n in grads]
        return torch.cat([torch.view_as_real(p).flatten() if p.is_complex() else p.flatten() for p in parts])

    rows = [flat(grads, b) for b in range(len(want["c"]))]
    for b, row in enumerate(rows):
        assert norms(grads)[b] == pytest.approx(float(row.norm()))
        assert dot(grads, want["vectors"])[b] == pytest.approx(float(row @ flat(want["vectors"])))
        for a, other in enumerate(rows):
            assert gram(grads)[b, a] == pytest.approx(float(row @ other))
    assert rel_err(want["cross_gram", "total"], want["gram", "total"]) == 0
    assert rel_err(sum(want["gram", "layer"].values()), want["gram", "total"]) < 1e-12
    assert rel_err(sum(v**2 for v in want["norms", "param"].values()), want["norms", "total"] ** 2) < 1e-12
    clipped = sum(row * min(1.0, 0.1 / float(row.norm())) for row in rows)
    assert rel_err(flat(clipped_sum(grads, 0.1)), clipped) < 1e-12


def test_relative_error_notices_what_is_missing() -> None:
    want = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert rel_err(want, want) == 0
    assert rel_err({"a": torch.ones(2)}, want) == float("inf")
    assert rel_err({"a": torch.ones(3), "b": torch.zeros(2)}, want) == float("inf")
    assert rel_err({"a": torch.full((2,), torch.nan), "b": torch.zeros(2)}, want) == float("inf")
    assert rel_err({"a": torch.ones(2), "b": torch.full((2,), 1e-8)}, want) == pytest.approx(1e-5)


def _flawless(example: strategies.Example) -> None:
    """Losses of shape [B] in float64, gradients that are numbers, the same for each sample alone."""
    model, loss_fn, inputs, targets = example.build()
    grads = loop_grads(model, loss_fn, inputs, targets)
    losses = loss_fn(call(model, inputs), targets)
    assert losses.shape == targets[0].shape[:1]
    assert losses.dtype == torch.float64
    assert all(g.isfinite().all() for g in grads.values())
    again = loop_grads(*example.build())
    assert rel_err(again, grads) == 0


@given(strategies.layers())
def test_random_layers_build(example: strategies.Example) -> None:
    _flawless(example)


@given(strategies.models(empty=True))
def test_random_models_build(example: strategies.Example) -> None:
    _flawless(example)


@given(strategies.models())
def test_random_models_do_not_couple(example: strategies.Example) -> None:
    """Otherwise a refusal would be right, and that the library is exact on them would say nothing."""
    model, loss_fn, x, targets = example.build()
    alone = Case("", example.build, axes=example.axis)
    assert rel_err(isolated_grads(alone, model, loss_fn, x, targets), loop_grads(model, loss_fn, x, targets)) < 1e-9


@pytest.mark.skipif(not module_db.available(), reason="torch's table of modules takes the package expecttest")
def test_torchs_own_inputs_make_cases() -> None:
    cases, counts = module_db.module_db_cases(), module_db.report()
    assert len(cases) == counts["batched"] + counts["given a batch"] + counts["one sample"] > 1000
    assert len({c.name for c in cases}) == len(cases)
    for case in cases[:: len(cases) // 200]:
        built = case.build()
        grads = loop_grads(*built)
        assert all(g.isfinite().all() for g in grads.values()), case
        if case.sliceable and not case.coupled and len(next(iter(grads.values()))) < 20:
            assert rel_err(grads, isolated_grads(case, *built)) < 1e-9, case
