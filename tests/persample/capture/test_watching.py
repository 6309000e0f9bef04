"""Batches that follow a plan run unwatched: nobody can tell, whatever comes next."""

from __future__ import annotations

import importlib

import pytest
import torch
from oracle import loop_grads_of
from torch import Tensor, nn
from torch.nn import functional as F

import persample
from persample.capture.replay import MISSES

reading = importlib.import_module("persample.capture.analysis")
pytestmark = pytest.mark.usefixtures("double")


class Switching(nn.Module):
    """Does something else from one day to the next, with random numbers in between."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.drop = nn.Linear(3, 4), nn.Linear(4, 2), nn.Dropout(0.4)
        self.register_buffer("seen", torch.zeros(()))
        self.kind, self.calls = "plain", 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.kind == "counting":
            self.seen += 1
        if self.kind == "overwriting":
            x.add_(1.0)
        h = self.drop(self.one(x))
        if self.kind == "other":
            h = h.sin() * h
        if self.kind == "third":
            h = h.cos().exp()
        if self.kind == "coupled":
            h = h - h.mean(0)
        return self.two(h.tanh())


def loss(y: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(y, target, reduction="none")


def batch(number: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(number)
    return torch.randn(5, 3, generator=random), torch.randint(2, (5,), generator=random)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every run that is watched."""
    seen: list[int] = []
    original = reading.watched_losses_of
    monkeypatch.setattr(reading, "watched_losses_of", lambda problem: (seen.append(1), original(problem))[1])
    return seen


def assert_exact(model: nn.Module, number: int, hold: str = "factors") -> None:
    """The rows are those of a loop with the same random numbers."""
    x, y = batch(number)
    torch.manual_seed(number)
    found = persample.per_sample(model, loss, x.clone(), y, hold=hold)
    torch.manual_seed(number)
    losses = loss(model(x.clone()), y)
    expected = loop_grads_of(losses, dict(model.named_parameters()))
    torch.testing.assert_close(found.losses, losses.detach())
    for name, rows in found.grads().items():
        torch.testing.assert_close(rows, expected[name])


@pytest.mark.parametrize("hold", ["factors", "graph"])
def test_a_new_graph_is_run_again_from_the_same_random_numbers(watched: list[int], hold: str) -> None:
    model = Switching()
    for number in range(6):
        assert_exact(model, number, hold)
    assert len(watched) == 2, "the first batch makes the plan, the second follows it"
    before = model.calls
    model.kind = "other"
    assert_exact(model, 7, hold)
    assert len(watched) == 3
    assert model.calls == before + 2, "of the first, unwatched run nothing is left"
    for number in range(8, 12):
        assert_exact(model, number, hold)
    assert len(watched) == 4


OPERATIONS = {
    "reshape": lambda h: h.transpose(1, 2).contiguous().reshape(5, 2, 4, 2).sin(),
    "reshape of a view": lambda h: h.view(5, 2, 2, 4).transpose(1, 2).reshape(5, 16),
    "flatten": lambda h: h.flatten(1).cos(),
    "unflatten": lambda h: h.unflatten(2, (2, 2)),
    "matmul": lambda h: h @ h.transpose(1, 2),
    "einsum": lambda h: torch.einsum("bij,bkj->bik", h, h),
    "attention": lambda h: F.scaled_dot_product_attention(*(h.view(5, 1, 4, 4),) * 3).transpose(1, 2).reshape(5, 4, 4),
    "causal attention": lambda h: F.scaled_dot_product_attention(*(h.view(5, 1, 4, 4),) * 3, is_causal=True),
    "softmax": lambda h: h.softmax(2).log_softmax(1),
    "normalised": lambda h: F.layer_norm(F.rms_norm(h, (4,)), (4,)),
    "groups": lambda h: F.group_norm(h, 2),
    "chunks": lambda h: torch.cat([a * b for a, b in zip(h.chunk(2, 2), h.split(2, 2), strict=True)], 2),
    "activations": lambda h: F.gelu(F.silu(F.leaky_relu(F.elu(h)))),
    "pooled": lambda h: F.adaptive_avg_pool1d(F.max_pool1d(h, 2), 1),
    "padded": lambda h: F.pad(h, (1, 1)).unfold(2, 2, 1),
    "interpolated": lambda h: F.interpolate(h, scale_factor=2.0, mode="linear"),
    "stacked": lambda h: torch.stack([h, h.sin()], 1).mean(1),
    "expanded": lambda h: h[:, :, None].expand(-1, -1, 3, -1).reshape(5, 12, 4),
    "normalised to length": lambda h: F.normalize(h, dim=2) + F.cosine_similarity(h, h.flip(2), 2)[..., None],
    "selected": lambda h: torch.where(h > 0, h, h.exp()).masked_fill(h > 2, 0.0),
    "folded": lambda h: F.fold(F.unfold(h[:, None], 2), (4, 4), 2),
    "powers": lambda h: h.square().add(1).sqrt().clamp(max=3.0).cumsum(1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_run_has_the_same_graph_whether_it_is_watched_or_not(watched: list[int], name: str) -> None:
    """Operations are called otherwise where somebody watches: `reshape` makes a node of another kind, for one."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.scale = nn.Linear(3, 16), nn.Parameter(torch.rand(1))

        def forward(self, x: Tensor) -> Tensor:
            return OPERATIONS[name](self.one(x).view(5, 4, 4)).flatten(1) * self.scale

    model = Model()
    for number in range(5):
        x = batch(number)[0]
        norms = persample.per_sample(model, lambda y, _: y.square().sum(1), x).norms()
        rows = loop_grads_of(model(x).square().sum(1), dict(model.named_parameters()))
        torch.testing.assert_close(
            norms, torch.stack([r.flatten(1).square().sum(1) for r in rows.values()]).sum(0).sqrt()
        )
    assert len(watched) == 2, "the first batch makes the plan, the second follows it"


def test_it_is_tried_a_few_times_only(watched: list[int]) -> None:
    model = Switching()
    for kind in ("plain", "other", "third")[: MISSES + 1]:
        model.kind = kind
        for number in range(4):
            assert_exact(model, number)
    runs = len(watched)
    for number in range(3):
        assert_exact(model, number)
    assert len(watched) == runs + 3


@pytest.mark.parametrize("kind", ["counting", "overwriting"])
def test_what_leaves_traces_is_always_watched(watched: list[int], kind: str) -> None:
    model = Switching()
    model.kind = kind
    for number in range(4):
        assert_exact(model, number)
    assert len(watched) == 4
    assert model.seen == (8 if kind == "counting" else 0), "once by us, once by the loop, each"


def test_samples_that_begin_to_interact_are_refused() -> None:
    model = Switching()
    for number in range(4):
        assert_exact(model, number)
    model.kind = "coupled"
    with pytest.raises(persample.CoupledSamplesError):
        persample.per_sample(model, loss, *batch(0))


def test_another_batch_size_is_no_new_graph(watched: list[int]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for size in (5, 5, 5, 3, 4, 5):
        x, y = torch.randn(size, 3), torch.randint(2, (size,))
        found = persample.per_sample(model, loss, x, y)
        expected = loop_grads_of(loss(model(x), y), dict(model.named_parameters()))
        for name, rows in found.grads().items():
            torch.testing.assert_close(rows, expected[name])
    assert len(watched) == 2


class Recurrent(nn.Module):
    """Carries its state from batch to batch, as an attribute, in a list or as a buffer."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.cell, self.where, self.kept, self.calls = nn.RNNCell(3, 2), where, [torch.zeros(5, 2)], 0
        self.attribute = torch.zeros(5, 2)
        self.register_buffer("buffer", torch.zeros(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.kept[-1] if self.where == "list" else getattr(self, self.where)
        for step in x.unbind(1):
            h = self.cell(step, h)
        if self.where == "list":
            self.kept.append(h.detach())
        else:
            setattr(self, self.where, h.detach())
        return h


@pytest.mark.parametrize("where", ["attribute", "list", "buffer"])
def test_a_state_that_is_carried_on_is_put_back_before_a_second_run(watched: list[int], where: str) -> None:
    model, other = Recurrent(where), Recurrent(where)
    other.load_state_dict(model.state_dict())
    for number, length in enumerate((4, 4, 4, 5, 4, 6)):
        x, y = torch.randn(5, length, 3), torch.randint(2, (5,))
        found = persample.per_sample(model, loss, x, y)
        losses = loss(other(x), y)
        expected = loop_grads_of(losses, dict(other.named_parameters()))
        torch.testing.assert_close(found.losses, losses.detach())
        for name, rows in found.grads().items():
            torch.testing.assert_close(rows, expected[name])
        assert model.calls == number + 1
        assert len(model.kept) == len(other.kept)
    assert len(watched) == 5, "all but the third, but twice in vain"


def test_another_mode_is_watched_and_run_once(watched: list[int]) -> None:
    """Statistics of batch normalisation move in training mode alone."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    for training in (False, False, False, True, True, True, False):
        before = model[1].num_batches_tracked.item()
        model.train(training)
        persample.per_sample(model, loss, *batch(0), coupled="rows")
        assert model[1].num_batches_tracked == before + training
    assert len(watched) == 5


@pytest.mark.parametrize("where", ["closure", "elsewhere", "statistics"])
def test_what_is_written_anywhere_is_a_trace(watched: list[int], where: str) -> None:
    class Centre:
        count = torch.zeros(())

    centre, mean, var = nn.BatchNorm1d(2), torch.zeros(2), torch.ones(2)
    model = nn.Linear(3, 2)
    model.register_buffer("mean", mean)
    model.register_buffer("var", var)

    def moving(y: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            if where == "closure":
                centre(y)
            elif where == "elsewhere":
                Centre.count.add_(1.0)
            else:
                F.batch_norm(y, model.mean, model.var, training=True)  # raises no version
        return loss(y, target)

    for number in range(4):
        persample.per_sample(model, moving, *batch(number))
    assert len(watched) == 4


def test_a_tensor_that_begins_to_change_is_an_error_where_the_graph_is_new() -> None:
    model = Switching()
    for number in range(4):
        assert_exact(model, number)

    def counting(y: Tensor, target: Tensor) -> Tensor:
        model.seen += 1
        return loss(y, target).exp()

    with pytest.raises(persample.UnsupportedError, match="changed a tensor in place"):
        persample.per_sample(model, counting, *batch(0))
    persample.per_sample(model, counting, *batch(0))
    assert model.seen == 2
