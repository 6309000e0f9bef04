"""Losses that share forward rows: exact whatever they share, and without a search for each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import loop_grads_of, rel_err, trainable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import persample
from persample.attribution.groups import Grouping, grouping_of
from persample.backends import jacobian, losses
from persample.graph.nodes import trace

pytestmark = pytest.mark.usefixtures("double")


class Tokens(nn.Module):
    """A small encoder with a learned table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
        self.head = weight_norm(nn.Linear(8, 11))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.layer(x))


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(48, 5))


def all_outputs(model: nn.Module) -> Tensor:
    return model(torch.randn(4, 1, 6, 6)).flatten()


def outputs_first(model: nn.Module) -> Tensor:
    return model(torch.randn(4, 1, 6, 6)).T.flatten()


def two_losses(model: nn.Module) -> Tensor:
    f = model(torch.randn(4, 1, 6, 6))
    return torch.cat([f.square().sum(1), f.sin().sum(1)])


def token_losses(model: nn.Module) -> Tensor:
    ids = torch.randint(11, (3, 6))
    return F.cross_entropy(model(ids).transpose(1, 2), ids, reduction="none").flatten()


def some_tokens(model: nn.Module) -> Tensor:
    ids = torch.randint(11, (3, 6))
    return F.cross_entropy(model(ids).transpose(1, 2), ids, reduction="none")[ids > 4]


def pairs(model: nn.Module) -> Tensor:
    a, b = (F.normalize(model(torch.randn(5, 1, 6, 6))) for _ in range(2))
    return F.cross_entropy(a @ b.T / 0.1, torch.arange(5), reduction="none")


def batch_normalised(model: nn.Module) -> Tensor:
    return F.batch_norm(model(torch.randn(6, 1, 6, 6)), None, None, training=True).square().sum(1)


USES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], Grouping | None]] = {
    "all outputs": (network, all_outputs, Grouping(4, 5, 20)),
    "outputs first": (network, outputs_first, Grouping(4, 1, 20)),
    "two losses, joined": (network, two_losses, Grouping(4, 1, 8)),
    "tokens": (Tokens, token_losses, Grouping(3, 6, 18)),
    "some tokens": (Tokens, some_tokens, None),
    "pairs": (network, pairs, None),
    "batch normalisation": (network, batch_normalised, None),
}


@pytest.mark.parametrize("name", USES)
def test_as_the_loop(name: str) -> None:
    make, use, grouping = USES[name]
    torch.manual_seed(0)
    model = make()
    params = trainable(model)
    for _ in range(10):  # a plan follows the first, and is verified at times
        found = use(model)
        want = loop_grads_of(found, params)
        if grouping is not None:
            assert grouping_of(trace(found), params, len(found)) == grouping
        rows = dict(zip(params, persample.grad(found, params.values()), strict=True))
        assert rel_err(rows, want) < 1e-9
    psg = persample.from_losses(found, params)
    lines = torch.cat([each.flatten(1) for each in want.values()], 1)
    assert rel_err(psg.norms(), lines.norm(dim=1)) < 1e-9
    assert rel_err(psg.gram(), lines @ lines.T) < 1e-9
    c = torch.randn(len(found))
    assert rel_err(psg.weighted_sum(c), {n: torch.einsum("b,b...->...", c, g) for n, g in want.items()}) < 1e-9


@given(
    batch=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 3), min_size=0, max_size=2),
    axis=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_any_shape_of_losses(batch: int, sizes: list[int], axis: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, max(1, torch.Size(sizes).numel())))
    outputs = model(torch.randn(batch, 3)).view(batch, *sizes)
    found = outputs.movedim(0, axis % outputs.ndim)
    rows = persample.grad(found, model.parameters())
    for got, want in zip(rows, loop_grads_of(found.flatten(), trainable(model)).values(), strict=True):
        assert got.shape == (*found.shape, *want.shape[1:])
        assert rel_err(got.flatten(0, found.ndim - 1), want) < 1e-9


def test_one_pass_for_each_output_and_none_for_each_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty losses of four samples take five passes, all at once here; the second call asks nobody whose rows are
    whose."""
    model = network()
    passes = []
    real = jacobian._batched

    def counted(flat: Tensor, edges: list, chunk: range) -> list:
        passes.append((tuple(flat.shape), len(chunk)))
        return real(flat, edges, chunk)

    monkeypatch.setattr(jacobian, "_batched", counted)
    persample.grad(all_outputs(model), model.parameters())
    monkeypatch.setattr(losses, "find_uses", None)
    persample.grad(all_outputs(model), model.parameters())
    assert passes == [((4, 5), 5)] * 2


def test_many_positions_and_few_entries_are_held_as_rows() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    x = torch.randn(2, 40, 2)
    psg = persample.from_losses(model(x).squeeze(2).cumsum(1).flatten(), dict(model.named_parameters()))
    held = {use.parameter: use.block for use in psg.explain()}
    assert held["0.weight"] == "Dense"
    assert rel_err(psg.grads(), loop_grads_of(model(x).squeeze(2).cumsum(1).flatten(), trainable(model))) < 1e-9


def test_a_scalar_is_refused() -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="already reduced"):
        persample.grad(model(torch.randn(4, 3)).sum(), model.parameters())
