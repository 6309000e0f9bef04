"""hold="graph": the same results with nothing held but the autograd graph."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import persample
from persample.testing.cases import CASES, Case

REFUSALS = (persample.UnsupportedError, persample.CoupledSamplesError)


def held(case: Case, hold: str) -> Any:
    model, loss_fn, inputs, targets = case.build()
    torch.manual_seed(7)  # the same masks for both
    return persample.per_sample(model, loss_fn, inputs, targets, hold=hold)


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_as_with_factors(case: Case) -> None:
    try:
        factors = held(case, "factors")
    except REFUSALS as refusal:
        with pytest.raises(type(refusal)):
            held(case, "graph")
        return
    if "checkpointed" in case.name and not hasattr(torch.utils.checkpoint, "GraphExecGroup"):  # before torch 2.10
        with pytest.raises(persample.UnsupportedError, match="give them once"):
            held(case, "graph")
        return
    graph = held(case, "graph")
    generator = torch.Generator().manual_seed(0)
    c = torch.rand(factors.batch, generator=generator, dtype=torch.float64).to(factors.losses)
    rows, inner = factors.grads(), factors.gram()
    weighted = factors.weighted_sum(c)
    same(graph.grads(), rows)
    same(graph.norms("param"), factors.norms("param"))
    same(graph.gram(), inner)
    same(graph.weighted_sum(c), weighted)
    same(graph.gram(other=factors), inner)
    same(factors.gram(other=graph), inner)
    same(graph.dot(weighted), factors.dot(weighted))
    same(graph.sum_of_squares(), factors.sum_of_squares())
    same(graph.variance(), factors.variance())
    directions = rows if factors.batch else {}
    same(graph.dot(directions), inner if factors.batch else factors.norms())  # its own rows as directions
    same(graph.grads(), rows)  # the graph is still there
    assert graph.unused == factors.unused
    assert [row.rule for row in graph.explain()] == [row.rule for row in factors.explain()]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def squares(outputs: Tensor, _: Any) -> Tensor:
    return outputs.square().sum(1)


def test_factors_are_gone_when_the_next_layer_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from persample.result.gradient import Gradient

    model, x = network(), torch.randn(5, 6, dtype=torch.float64)
    psg = persample.per_sample(model, squares, x, hold="graph")
    alive: list[int] = []
    factors: list[weakref.ref] = []
    original = Gradient.squared_norms

    def watched(self: Gradient) -> Tensor:
        alive.append(sum(reference() is not None for reference in factors))
        factors.extend(weakref.ref(block.z) for block in self.blocks if hasattr(block, "z"))
        return original(self)

    monkeypatch.setattr(Gradient, "squared_norms", watched)
    psg.norms()
    assert len(factors) == 3
    assert max(alive) <= 1


def test_nothing_is_held_after_the_result_is_gone() -> None:
    model, x = network(), torch.randn(5, 6, dtype=torch.float64)
    psg = persample.per_sample(model, squares, x, hold="graph")
    psg.norms()
    graph = weakref.ref(psg._graph.reading.losses)  # type: ignore[attr-defined]
    del psg
    gc.collect()
    assert graph() is None


def test_a_step_between_two_reductions_is_noticed() -> None:
    model, x = network(), torch.randn(5, 6, dtype=torch.float64)
    psg = persample.per_sample(model, squares, x, hold="graph")
    psg.norms()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    with pytest.raises(RuntimeError, match="modified"):
        psg.norms()


def test_chunks_may_hold_graphs() -> None:
    model, x = network(), torch.randn(7, 6, dtype=torch.float64)
    whole = persample.per_sample(model, squares, x)
    chunked = persample.per_sample(model, squares, x, hold="graph", chunk_size=3)
    same(chunked.norms(), whole.norms())
    same(chunked.gram(), whole.gram())


@pytest.mark.parametrize(
    ("options", "words"),
    [({"hold": "all"}, "'factors' or 'graph'"), ({"hold": "graph", "backend": "hooks"}, "needs backend='outputs'")],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        persample.per_sample(network(), squares, torch.randn(5, 6, dtype=torch.float64), **options)


def test_a_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from persample.rules import RULES, linear

    right = linear.addmm

    def wrong(site: Any) -> Any:
        block = right(site)
        return block if site.slot != 2 else type(block)(block.x, 2 * block.z)

    monkeypatch.setitem(RULES, "AddmmBackward0", wrong)
    with pytest.raises(persample.CheckError, match="add up"):
        persample.per_sample(network(), squares, torch.randn(5, 6, dtype=torch.float64), hold="graph")
