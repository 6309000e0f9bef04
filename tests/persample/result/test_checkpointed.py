"""Models that checkpoint: every reduction computes a segment again when it comes to it, and nothing else is held."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import loop_grads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import persample
from persample.result.holding.graph_held import GraphPerSampleGrads

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.skipif(
        not hasattr(torch.utils.checkpoint, "GraphExecGroup"),
        reason="torch.utils.checkpoint.GraphExecGroup: torch 2.10",
    ),
]
B, T, D = 4, 5, 6


class Scaled(nn.Module):
    """A scale that is one more than its parameter, in an operation without a rule of its own beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.hypot(x * (1 + self.scale), self.shift)


class Segment(nn.Module):
    """What a checkpoint may hold; it counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scaled = nn.LayerNorm(D), Scaled()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.conv, self.feed = nn.Conv1d(T, T, 3, padding=1), nn.Sequential(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, D))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.feed(self.scaled(x)) + self.conv(x)


class Checkpointed(nn.Module):
    """Two segments, called as `run` says."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.out = Segment(), Segment(), nn.Linear(D, 2)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.run(self.second, self.run(self.first, x)))  # type: ignore[no-any-return]


def simply(segment: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(segment, x, use_reentrant=False)  # type: ignore[no-any-return]


def products_kept() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default, torch.ops.aten.mm.default])


RUNS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "simply": simply,
    "to the end": lambda segment, x: checkpoint(segment, x, use_reentrant=False, early_stop=False),
    "nested": lambda segment, x: checkpoint(lambda y: simply(segment, y).sin(), x, use_reentrant=False),
    "called twice": lambda segment, x: simply(segment, simply(segment, x)),
    "beside itself": lambda segment, x: simply(segment, x) + segment(x),
}


def losses_of(outputs: Tensor, targets: None) -> Tensor:
    return outputs.square().sum((1, 2))


@pytest.mark.parametrize("hold", ["auto", "graph", "factors"])
@pytest.mark.parametrize("name", RUNS)
def test_every_reduction_is_that_of_the_loop(name: str, hold: str) -> None:
    torch.manual_seed(0)
    model = Checkpointed(RUNS[name])
    for _ in range(4):  # the first batch is attributed, later ones follow its plan
        x = torch.randn(B, T, D)
        expected = loop_grads(model, losses_of, x, None)
        found = persample.per_sample(model, losses_of, x, hold=hold)
        assert isinstance(found, GraphPerSampleGrads) == (hold != "factors")
        flat = torch.cat([rows.flatten(1) for rows in expected.values()], 1)
        bound = float(flat.norm(dim=1).median())
        clipped = torch.einsum("b,bp->p", (bound / flat.norm(dim=1)).clamp(max=1), flat)
        torch.testing.assert_close(found.norms(), flat.norm(dim=1), rtol=1e-9, atol=0)
        torch.testing.assert_close(found.gram(), flat @ flat.T, rtol=1e-9, atol=1e-9)
        parts = [each.flatten() for each in found.clipped_sum(bound).values()]
        torch.testing.assert_close(torch.cat(parts), clipped, rtol=1e-9, atol=1e-9)
        for key, rows in found.grads().items():
            torch.testing.assert_close(rows, expected[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("hold", ["auto", "graph", "factors"])
def test_beside_a_sample_that_is_not_finite(hold: str) -> None:
    """Hooks of this library, which put finite numbers in its place, are there beside those of the checkpoint."""

    class Scaled(Checkpointed):
        def __init__(self) -> None:
            super().__init__(simply)
            self.scale = nn.Parameter(torch.rand(D))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x * self.scale).exp())

    torch.manual_seed(0)
    model = Scaled()
    for segment in (model.first, model.second):
        segment.scaled = nn.Identity()
    x = torch.randn(B, T, D)
    x[1, 2] = torch.nan
    found = persample.per_sample(model, losses_of, x, hold=hold)
    alone = {b: loop_grads(model, losses_of, x[b : b + 1], None) for b in range(B)}
    for _ in range(2):
        for name, rows in found.grads().items():
            each = torch.cat([alone[b][name] for b in range(B)])
            torch.testing.assert_close(rows, each, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("hold", ["auto", "graph", "factors"])
def test_what_cannot_be_told_of_a_sample_that_is_not_finite_is_said(hold: str) -> None:
    """An operation without a rule, of which nothing that it has saved can be replaced."""
    model, x = Checkpointed(simply), torch.randn(B, T, D)
    x[1, 2] = torch.nan
    with pytest.raises(persample.UnsupportedError, match="are not finite for some sample"):
        persample.per_sample(model, losses_of, x, hold=hold).grads()


@pytest.mark.parametrize("hold", ["auto", "graph", "factors"])
def test_selective_checkpoints_are_refused_in_words(hold: str) -> None:
    model = Checkpointed(lambda segment, x: checkpoint(segment, x, use_reentrant=False, context_fn=products_kept))
    with pytest.raises(persample.UnsupportedError, match="Leave context_fn out"):
        persample.per_sample(model, losses_of, torch.randn(B, T, D), hold=hold).norms()


def test_a_segment_runs_twice_in_a_pass_however_many_parameters_it_has() -> None:
    """Once for the pass, once for what reads beside it; the operation without a rule has it run once more a row."""
    torch.manual_seed(0)
    model = Checkpointed(simply)
    for segment in (model.first, model.second):
        segment.scaled = nn.Identity()
    x = torch.randn(B, T, D)
    for _ in range(2):
        persample.per_sample(model, losses_of, x).norms()
    found = persample.per_sample(model, losses_of, x)
    before = model.first.runs
    found.norms()
    assert model.first.runs == before + 2


def test_nothing_is_kept_between_reductions() -> None:
    torch.manual_seed(0)
    model = Checkpointed(simply)
    x = torch.randn(B, T, D)
    for _ in range(2):
        persample.per_sample(model, losses_of, x).norms()
    found = persample.per_sample(model, losses_of, x)
    there = tensors()
    norms = found.norms()
    del norms
    assert tensors() - there <= 2, "what a checkpoint has computed again is given up"


def tensors() -> int:
    gc.collect()
    return sum(type(each) is Tensor for each in gc.get_objects())
