"""Rows that data place: the proof reads whose they are off the indices, and says what the gradients say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import loop_grads, rel_err
from routing import MODELS, losses_of
from torch import Tensor

import persample
from persample.attribution.owner import NOBODY
from persample.attribution.proof.proven import Proof
from persample.graph.nodes import trace

pytestmark = pytest.mark.usefixtures("double")


def rows_from(x: Tensor, index: Tensor, kind: str) -> Tensor:
    """Rows of x, [n, d] of [m, d], taken in one of the ways in which torch takes rows."""
    if kind == "index":
        return x[index]
    if kind == "None, index":
        return x[None, index].reshape(-1, x.shape[1])
    if kind == "negative":
        return x[index - len(x)]
    if kind == "index_select":
        return x.index_select(0, index)
    if kind == "gather":
        return x.gather(0, index[:, None].expand(-1, x.shape[1]))
    if kind == "two indices":
        columns = torch.arange(x.shape[1]).expand(len(index), -1)
        return x[index[:, None].expand_as(columns), columns]
    mask = torch.zeros(len(x), dtype=torch.bool).index_fill(0, index, True)
    if kind == "mask":
        return x[mask]
    if kind == "masked_select":
        return x.masked_select(mask[:, None]).view(-1, x.shape[1])
    raise ValueError(kind)


def rows_to(h: Tensor, index: Tensor, size: int, kind: str) -> Tensor:
    """Rows h [n, d] put into [size, d], in one of the ways in which torch puts rows."""
    out = h.new_zeros(size, h.shape[1])
    if kind == "index_add":
        return out.index_add(0, index, h)
    if kind == "index_put":
        return out.index_put((index,), h, accumulate=True)
    if kind == "index_copy":
        return out.index_copy(0, index, h)
    if kind == "assigned":
        out[index] = h
        return out
    if kind == "scatter_add":
        return out.scatter_add(0, index[:, None].expand_as(h), h)
    raise ValueError(kind)


SEVERAL = -2
TAKING = ("index", "None, index", "negative", "index_select", "gather", "two indices", "mask", "masked_select")
PUTTING = ("index_add", "index_put", "index_copy", "assigned", "scatter_add")


def owners_by_gradients(losses: Tensor, node: Any) -> Tensor:
    """The sample of each row of a node's output, `NOBODY` or `SEVERAL`."""
    rows = []
    for loss in losses:
        edge = torch.autograd.graph.GradientEdge(node, 0)
        [grad] = torch.autograd.grad(loss, [edge], retain_graph=True, allow_unused=True)
        rows.append(grad.flatten(1).abs().sum(1) > 0)
    depends = torch.stack(rows).long()
    several = depends.sum(0) > 1
    return torch.where(depends.any(0), depends.argmax(0), NOBODY).masked_fill(several, SEVERAL)


@given(st.sampled_from(TAKING), st.sampled_from(PUTTING), st.integers(2, 4), st.integers(1, 5), st.integers(0, 10**6))
def test_the_proof_says_what_gradients_say(take: str, put: str, batch: int, each: int, seed: int) -> None:
    """Tokens are dropped, permuted and put back; whose the rows between are."""
    generator = torch.Generator().manual_seed(seed)
    size = batch * each
    count = int(torch.randint(1, size + 1, (), generator=generator))
    index = torch.randperm(size, generator=generator)[:count]
    if "mask" in take:
        index = index.sort().values
    x = torch.randn(batch, each, 3, generator=generator, requires_grad=True)
    taken = rows_from((2 * x).flatten(0, 1), index, take)
    middle = taken.sin()
    back = rows_to(middle * 3, index, size, put).view(batch, each, 3)
    losses = (x + back).square().sum((1, 2))
    proof = Proof(trace(losses), batch)
    assert middle.grad_fn is not None
    owner = proof.owner(middle.grad_fn, 0)
    assert owner is not None
    expected = owners_by_gradients(losses, middle.grad_fn)
    assert owner.axis == 0
    assert torch.equal(owner.ids.expand(count), expected)


def test_rows_that_two_samples_share_are_nobodys_own() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    shared = (2 * x)[torch.tensor([0, 0, 2])]
    losses = shared.square().sum(1)
    graph = trace(losses)
    assert Proof(graph, 3).owner(shared.grad_fn, 0) is not None
    [(source, _)] = [edge for edge in shared.grad_fn.next_functions if edge[0] is not None]
    assert Proof(graph, 3).owner(source, 0) is None


def test_rows_that_nothing_depends_on_are_nobodys() -> None:
    x = torch.randn(4, 2, requires_grad=True)
    doubled = 2 * x
    losses = doubled[torch.tensor([3, 0])].square().sum(1)
    owner = Proof(trace(losses), 2).owner(doubled.grad_fn, 0)
    assert owner is not None
    assert owner.ids.tolist() == [1, NOBODY, NOBODY, 0]


@pytest.mark.parametrize("name", MODELS)
def test_batches_are_exact_and_not_probed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = MODELS[name](), []
    run = torch.autograd._engine_run_backward

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        return run(*args, **kwargs)

    counts = []
    for batch, length in ((6, 9), (6, 9), (6, 9), (5, 8), (6, 9), (6, 9)):
        words, targets = torch.randint(9, (batch, length)), torch.randint(3, (batch,))
        passes.clear()
        with monkeypatch.context() as patched:
            patched.setattr(torch.autograd, "_engine_run_backward", counted)
            rows = persample.per_sample(model, losses_of, words, targets).grads()
        counts.append(len(passes))
        assert rel_err(rows, loop_grads(model, losses_of, words, targets)) < 1e-12
    assert counts[0] > 1
    assert 1 in counts[1:]
    assert sum(each > 1 for each in counts[1:]) <= 1  # an expert without tokens has another graph


def test_indices_that_hooks_unpack_are_left_alone() -> None:
    """In a checkpoint reading one would run its segment again; others can be read only once."""
    x, reads = torch.randn(4, 2, requires_grad=True), []

    def unpack(tensor: Tensor) -> Tensor:
        reads.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        doubled = 2 * x
        losses = doubled[torch.tensor([3, 0, 1, 2])].square().sum(1)
    assert Proof(trace(losses), 4).owner(doubled.grad_fn, 0) is None
    assert not reads
