"""Samples whose positions, or uses of a parameter, nearly cancel: as good as from rows, no longer than their bound."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fngd
import persample
from persample.blocks import reductions
from persample.blocks.cancellation import Terms
from persample.blocks.convolution.algorithms import ConvSpec
from persample.blocks.types import Conv, Dense, Outer, Pulled, Rows

BATCH = 5


class Difference(nn.Module):
    """A layer at two positions of a sample, or called for each of two views, and the difference of both."""

    def __init__(self, layer: nn.Module, *, calls: bool) -> None:
        super().__init__()
        self.layer, self.calls = layer, calls

    def forward(self, x: Tensor) -> Tensor:  # [B, 2, ...]
        if self.calls:
            return self.layer(x[:, 0]) - self.layer(x[:, 1])
        y = self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return y[:, 0] - y[:, 1]


class Positions(nn.Module):
    """A layer over a sample's positions, of which each is compared with the mean."""

    def __init__(self, layer: nn.Module, axis: int) -> None:
        super().__init__()
        self.layer, self.axis = layer, axis

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        signs = torch.linspace(-1, 1, y.shape[self.axis]).to(y)
        return torch.tensordot(y, signs - signs.mean(), ([self.axis], [0]))


class Tied(nn.Module):
    """Two linear maps by one weight: of two views of a sample, or one after the other, of which views are compared."""

    def __init__(self, *, in_turn: bool = False) -> None:
        super().__init__()
        self.weight, self.in_turn = nn.Parameter(0.1 * torch.randn(24, 24)), in_turn

    def forward(self, x: Tensor) -> Tensor:
        if self.in_turn:
            y = nn.functional.linear(nn.functional.linear(x, self.weight), self.weight.T)
            return y[:, 0] - y[:, 1]
        return nn.functional.linear(x[:, 0], self.weight) - x[:, 1] @ self.weight.T


Case = tuple[Callable[[], nn.Module], tuple[int, ...]]
CASES: dict[str, Case] = {
    "linear, positions": (lambda: Positions(nn.Linear(24, 16), 1), (BATCH, 6, 24)),
    "linear, views": (lambda: Difference(nn.Linear(24, 16), calls=False), (BATCH, 2, 24)),
    "linear, calls": (lambda: Difference(nn.Linear(24, 16), calls=True), (BATCH, 2, 24)),
    "tied": (Tied, (BATCH, 2, 24)),
    "tied, in turn": (lambda: Tied(in_turn=True), (BATCH, 2, 24)),
    "conv1d, wide kernel": (lambda: Positions(nn.Conv1d(16, 24, 5, groups=2), 2), (BATCH, 16, 9)),
    "conv2d, few channels": (lambda: Positions(nn.Conv2d(2, 3, 2), 3), (BATCH, 2, 8, 9)),
    "conv2d, views": (lambda: Difference(nn.Conv2d(2, 3, 3, padding=1), calls=False), (BATCH, 2, 2, 5, 5)),
    "conv2d, calls": (lambda: Difference(nn.Conv2d(2, 3, 3, stride=2), calls=True), (BATCH, 2, 2, 5, 5)),
    "transposed": (lambda: Difference(nn.ConvTranspose2d(8, 8, 3), calls=False), (BATCH, 2, 8, 3, 3)),
    "weight norm": (
        lambda: Difference(nn.utils.parametrizations.weight_norm(nn.Linear(24, 16)), calls=False), (BATCH, 2, 24)
    ),
}  # fmt: skip


def loss_fn(y: Tensor, _: object = None) -> Tensor:
    """Linear and quadratic, so that z differs between positions."""
    y = y.flatten(1)
    return y.sum(1) + 0.1 * y.square().sum(1)


def loop(model: nn.Module, x: Tensor) -> Tensor:
    """g_b of one sample after the other, all parameters beside each other, [B, N]."""
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(loss_fn(model(x[b : b + 1])).sum(), parameters) for b in range(len(x))]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@given(
    case=st.sampled_from(sorted(CASES)),
    offset=st.sampled_from([0.0, 1.0, 30.0, 1e3, 1e4, 1e6]),
    hold=st.sampled_from(["factors", "graph"]),
    seed=st.integers(0, 2**20),
)
def test_norms_gram_and_clipped_sums_are_as_good_as_those_of_rows(
    case: str, offset: float, hold: str, seed: int
) -> None:
    make, shape = CASES[case]
    torch.manual_seed(seed)
    model = make()
    x = offset * torch.randn(shape[0], *(1 for _ in shape[1:])) + torch.randn(shape)
    single = loop(model, x)
    want = loop(copy.deepcopy(model).double(), x.double())
    length = want.norm(dim=1)
    psg = persample.per_sample(model, loss_fn, x, hold=hold, check=False)

    allowed = 10 * ((single.double().norm(dim=1) - length) / length).abs().max() + 1e-6
    assert ((psg.norms().double() - length) / length).abs().max() <= allowed
    noise = 10 * ((single - want).norm(dim=1) / length).max() + 1e-6  # of a row, in any direction
    assert ((psg.gram().double() - want @ want.T) / (length[:, None] * length)).abs().max() <= noise
    other = persample.per_sample(model, loss_fn, x.flip(0), check=False)
    cross = persample.per_sample(model, loss_fn, x, check=False).gram(other=other).double()
    assert ((cross - want @ want.flip(0).T) / (length[:, None] * length.flip(0))).abs().max() <= noise

    bound = float(length.min()) / 2
    for b in range(shape[0]):
        one = persample.per_sample(model, loss_fn, x[b : b + 1], hold=hold, check=False).clipped_sum(bound)
        added = torch.cat([g.double().flatten() for g in one.values()]).norm()
        assert bound * (1 - 1e-5 - noise) <= added <= bound * (1 + 1e-5)


@pytest.mark.parametrize("calls", [False, True])
def test_training_asks_for_gram_matrices_that_have_lost_nothing(calls: bool) -> None:
    """Norms and Gram matrix of `reweight`, and the step of NGD, which solves with it."""
    torch.manual_seed(0)
    x = 255 * torch.randn(16, 1, 32) + 0.5 * torch.randn(16, 2, 32)
    seen = {}
    model = Difference(nn.Linear(32, 32, bias=False), calls=calls)
    rows = loop(copy.deepcopy(model).double(), x.double())
    with persample.reweight(model, lambda _, grads: seen.update(norms=grads.norms(), gram=grads.gram())):
        loss_fn(model(x)).sum().backward()
    torch.testing.assert_close(seen["norms"].double(), rows.norm(dim=1), rtol=1e-3, atol=0)
    torch.testing.assert_close(seen["gram"].double(), rows @ rows.T, rtol=0, atol=1e-3 * float(rows.norm() ** 2))

    fngd.NGD(model, lr=0.0, alpha=None, damping=1.0, scale="per_layer")
    want = rows.T @ torch.linalg.solve(rows @ rows.T + 16 * torch.eye(16).double(), torch.ones(16).double())
    model.zero_grad()
    loss_fn(model(x)).mean().backward()
    assert (model.layer.weight.grad.flatten().double() - want).norm() < 5e-3 * want.norm()


def test_only_samples_that_cancel_are_formed() -> None:
    torch.manual_seed(0)
    x, z = torch.randn(4, 1, 32).repeat(1, 3, 1), torch.randn(4, 3, 32)
    z[2] -= z[2].mean(0)
    block, terms = Outer(x, z), Terms()
    assert terms.cancelling(reductions.squared_norms(block, terms)).tolist() == [2]


@pytest.mark.parametrize(
    "block",
    [
        Outer(torch.randn(4, 2, 3), torch.randn(4, 2, 5)),
        Conv(torch.randn(4, 2, 6), torch.randn(4, 3, 4), ConvSpec((3, 2, 3), (1,), (0,), (1,), False, (0,), 1)),
        Rows(torch.randint(7, (4, 3)), torch.randn(4, 3, 2), 7),
        Dense(torch.randn(4, 2, 3)),
        Pulled(Dense(torch.randn(4, 2, 3)), lambda rows: 2 * rows.mT, (3, 2)),
    ],
    ids=lambda block: type(block).__name__,
)
def test_some_samples_of_a_block(block: persample.blocks.types.Block) -> None:
    rows = reductions.materialise(block)
    for samples in (slice(1, 3), torch.tensor([3, 0, 3]), slice(0, 0)):
        torch.testing.assert_close(reductions.materialise(block.at(samples)), rows[samples])


@given(dtype=st.sampled_from([torch.float32, torch.float64]), sign=st.sampled_from([1, -1]), time=st.integers(1, 4))
def test_norms_whose_squares_are_no_numbers(dtype: torch.dtype, sign: int, time: int) -> None:
    """A row that is representable has its norm, and clips as any other; the rest of the batch is not touched."""
    torch.manual_seed(0)
    power = sign * (0.7 if sign > 0 else 0.45) * math.log10(torch.finfo(dtype).max)
    x = torch.randn(4, time, 6, dtype=dtype)
    x[1] *= 10.0**power
    model = nn.Linear(6, 5, bias=False).to(dtype)
    psg = persample.per_sample(model, lambda y, _: y.sum((1, 2)), x)
    rows = psg.grads()["weight"].flatten(1)
    scale = rows.abs().amax(1)
    torch.testing.assert_close(psg.norms() / scale, (rows / scale[:, None]).norm(dim=1), rtol=1e-5, atol=1e-7)
    clipped = persample.per_sample(model, lambda y, _: y.sum((1, 2)), x[1:2]).clipped_sum(1.0)["weight"].norm()
    assert clipped == pytest.approx(min(1.0, 10 * float(psg.norms()[1])), rel=1e-5) or (sign < 0 and clipped <= 1)


@pytest.mark.parametrize("hold", ["factors", "graph"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_bound_holds_for_a_sample_that_is_no_number(hold: str, value: float) -> None:
    """Its norm is none, and so is every sum it is part of; layers that it left finite are not let through unclipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    x[2] = value
    psg = persample.per_sample(model, lambda y, _: y.square().sum(1), x, hold=hold)
    norms = psg.norms()
    assert norms.isfinite().tolist() == [True, True, False, True, True]
    assert all(bool(g.isnan().any()) for g in psg.clipped_sum(0.1).values())


def test_a_table_row_that_positions_touch_again() -> None:
    """z of equal tokens cancels within the row, in norms and Gram matrix, and in sums."""
    torch.manual_seed(0)
    indices = torch.tensor([[1, 4, 1, 0], [2, 2, 2, 2], [3, 0, 4, 1]])
    z = torch.randn(3, 4, 8)
    z[:2] += 100 * torch.randn(2, 1, 8) * torch.tensor([1, 0, -1, 0]).view(4, 1)
    block = Rows(indices, z, 6)
    rows = reductions.materialise(Rows(indices, z.double(), 6)).flatten(1)
    torch.testing.assert_close(reductions.squared_norms(block).double(), rows.square().sum(1), rtol=1e-5, atol=0)
    own = rows.norm(dim=1)
    k = reductions.gram(block).double()
    assert ((k - rows @ rows.T).abs() / (own[:, None] * own)).max() < 1e-5


class Table(nn.Module):
    """Rows of a table meet four positions of a sample, which cancel row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.table(torch.tensor([0, 0, 1, 1])) * x
        return y[:, 0] - y[:, 1] + y[:, 2] - y[:, 3]


@pytest.mark.parametrize("hold", ["factors", "graph"])
def test_a_sum_of_which_rounding_is_left_is_no_fault(hold: str) -> None:
    """The batch gradient that the rows are checked against has no more digits than they have."""
    noted = []
    for seed in range(8):
        torch.manual_seed(seed)
        model, x = Table(), 3e5 * torch.randn(3, 1, 64) + torch.randn(3, 4, 64)
        psg = persample.per_sample(model, loss_fn, x, hold=hold)
        noted += psg.notes
        single, want = loop(model, x), loop(copy.deepcopy(model).double(), x.double()).norm(dim=1)
        off = ((single.double().norm(dim=1) - want) / want).abs().max()
        assert ((psg.norms().double() - want) / want).abs().max() <= 10 * off + 1e-5
    assert hold == "graph" or any("nearly cancels" in note for note in noted)
