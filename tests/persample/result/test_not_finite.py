"""A sample that is not finite is NaN, or infinite as the loop has it, and no other sample is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Grads
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import persample
from persample.attribution.stand_ins import stand_ins
from persample.graph.nodes import trace


class Model(nn.Module):
    """A function of what it has and of x, [B, 3, 4]."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **own: Tensor | nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, each in own.items():
            setattr(self, name, each if isinstance(each, nn.Module) else nn.Parameter(each))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def permuted(model: Any, x: Tensor) -> Tensor:
    order = x[:, 0].detach().sum(1).argsort()
    return model.lin(x[order])[order.argsort()]


def routed(model: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    out = tokens.new_zeros(len(tokens), 2)
    for expert, layer in enumerate((model.lin, model.other)):
        mine = (tokens[:, 0] > 0) == bool(expert)
        out[mine] = layer(tokens[mine])
    return out.view(len(x), 3, 2)


def added(model: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    chosen = (tokens[:, 0].nan_to_num(1.0) > 0).nonzero()[:, 0]
    return (model.other(tokens).index_add(0, chosen, model.lin(tokens[chosen]))).view(len(x), 3, 2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)),
    "convolution": lambda: nn.Sequential(nn.Conv1d(3, 4, 2, groups=1), nn.GroupNorm(2, 4), nn.Conv1d(4, 2, 1)),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True),
    "recurrent": lambda: Model(lambda m, x: m.lstm(x.transpose(0, 1))[0].transpose(0, 1), lstm=nn.LSTM(4, 3)),
    "permuted": lambda: Model(permuted, lin=nn.Linear(4, 2)),
    "routed": lambda: Model(routed, lin=nn.Linear(4, 2), other=nn.Linear(4, 2)),
    "added": lambda: Model(added, lin=nn.Linear(4, 2), other=nn.Linear(4, 2)),
    "distances": lambda: Model(lambda m, x: torch.cdist(x, m.points), points=torch.randn(5, 4)),
    "rows of distances": lambda: Model(lambda m, x: torch.cdist(x[:, 0], m.points), points=torch.randn(5, 4)),
    "positions": lambda: Model(
        lambda m, x: (m.lin(x) + m.scale.exp() * m.table(torch.arange(3))).tanh(),
        lin=nn.Linear(4, 4), table=nn.Embedding(3, 4), scale=torch.randn(3, 1),
    ),
    "computed": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    "root": lambda: Model(lambda m, x: m.lin(x).square().sum(-1).sqrt(), lin=nn.Linear(4, 2, bias=False)),
    "scans": lambda: Model(lambda m, x: m.lin(x).cumsum(1) * m.v.cumsum(0), lin=nn.Linear(4, 2), v=torch.randn(2)),
    "solved": lambda: Model(
        lambda m, x: torch.linalg.solve(m.w @ m.w.T + torch.eye(4).to(x), x.transpose(1, 2)), w=torch.randn(4, 4)
    ),
    "batched": lambda: Model(lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), w=torch.randn(3, 4, 2)),
    "largest": lambda: Model(lambda m, x: F.max_pool1d(m.lin(x).transpose(1, 2), 2), lin=nn.Linear(4, 2)),
}  # fmt: skip
FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "NaN": lambda sample: sample.fill_(torch.nan),
    "one NaN": lambda sample: sample[1, 2:3].fill_(torch.nan),
    "infinity": lambda sample: sample.fill_(torch.inf),
    "zero": lambda sample: sample.zero_(),
    "huge": lambda sample: sample.mul_(1e200),
}


def losses_of(outputs: Tensor, _: Any) -> Tensor:
    return outputs.flatten(1).square().sum(1)


def alone(model: nn.Module, x: Tensor, losses: Callable[[Tensor, Any], Tensor] = losses_of) -> Grads:
    """The rows of samples that the model has met one by one."""
    parameters = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(
            losses(model(one[None]), None)[0], list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        for one in x
    ]
    return {name: torch.stack(each) for name, each in zip(parameters, zip(*rows, strict=True), strict=True)}


def assert_same(found: Grads, expected: Grads) -> None:
    for name, rows in expected.items():
        for row, right in zip(found[name], rows, strict=True):
            if bool(right.isfinite().all()):
                torch.testing.assert_close(row, right, rtol=1e-8, atol=1e-10 * (1 + float(right.abs().max())))
            else:
                assert not bool(row.isfinite().all()), name


@pytest.mark.parametrize("hold", ["factors", "graph"])
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6)
@given(st.integers(2, 5), st.data())
def test_only_the_sample_that_is_not_finite(name: str, hold: str, batch: int, data: st.DataObject) -> None:
    """Nor are later batches touched, and one with such a sample may follow others."""
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    model = MODELS[name]().double()
    for faulty in data.draw(st.sampled_from([(True, False), (False, True)])):
        x = torch.randn(batch, 3, 4).double()
        for at in data.draw(st.sets(st.integers(0, batch - 1), max_size=2)) if faulty else ():
            FAULTS[data.draw(st.sampled_from(sorted(FAULTS)))](x[at])
        assert_same(persample.per_sample(model, losses_of, x, hold=hold).grads(), alone(model, x))


def placed(model: Any, x: Tensor) -> Tensor:
    order = torch.arange(len(x)).flip(0).roll(1)
    return model.lin(x.index_select(0, order)).index_select(0, order.argsort())


def by_mask(model: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(len(x), 3, 2)
    for expert, layer in enumerate((model.lin, model.other)):
        mine = (x.nan_to_num(0, 0, 0)[:, 0, 0] > 0) == bool(expert)
        out = out.index_copy(0, mine.nonzero()[:, 0], layer(x[mine]).relu())
    return out


def weighed(model: Any, x: Tensor) -> Tensor:
    """Tokens in another order, of which zeros leave out some."""
    tokens = x.flatten(0, 1)
    order = torch.arange(len(tokens)).flip(0).roll(4)
    out = model.lin(tokens[order])[order.argsort()].view(len(x), 3, 2)
    return torch.eye(3).to(x)[0][:, None] * out


PLACED: dict[str, Callable[[], nn.Module]] = {
    "placed": lambda: Model(placed, lin=nn.Linear(4, 2)),
    "by mask": lambda: Model(by_mask, lin=nn.Linear(4, 2), other=nn.Linear(4, 2)),
    "weighed": lambda: Model(weighed, lin=nn.Linear(4, 2)),
}


def saturated(outputs: Tensor, _: Any) -> Tensor:
    return outputs.flatten(1).mul(torch.tensor([1.0, -2.0, 3.0]).repeat_interleave(2).to(outputs)).sigmoid().sum(1)


@pytest.mark.parametrize("way", [{"hold": "factors"}, {"hold": "graph"}, {"backend": "hooks"}])
@pytest.mark.parametrize("name", PLACED)
@settings(max_examples=6)
@given(st.integers(2, 5), st.data())
def test_zeros_are_somebodys_where_what_they_multiply_is_not_finite(
    name: str, way: dict[str, str], batch: int, data: st.DataObject
) -> None:
    """A loss that has saturated hands back zeros, of which nobody's number can be read: 0 · ∞ is NaN all the same."""
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    model, x = PLACED[name]().double(), torch.randn(batch, 3, 4).double()
    for at in data.draw(st.sets(st.integers(0, batch - 1), min_size=1, max_size=2)):
        x[at, :, 0] = torch.inf if data.draw(st.booleans()) else -torch.inf
    expected = alone(model, x, saturated)
    try:
        found = persample.per_sample(model, saturated, x, **way).grads()  # type: ignore[arg-type]
    except persample.UnsupportedError:
        assert "backend" in way
    else:
        assert_same(found, expected)


@pytest.mark.parametrize("backend", ["outputs", "hooks", "vmap"])
@pytest.mark.parametrize("sample", [3, 16, 39])
def test_no_number_of_a_sample_is_special(sample: int, backend: str) -> None:
    """What a weight of one leaves as it is looked like what no weight changes: NaN."""
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(40, 4).double()
    x[sample] = torch.nan
    norms = persample.per_sample(model, losses_of, x, backend=backend).norms()
    assert norms.isnan().nonzero().flatten().tolist() == [sample]


@pytest.mark.parametrize("name", ["layers", "routed", "positions"])
def test_grad_and_chunks(name: str) -> None:
    model, x = MODELS[name]().double(), torch.randn(5, 3, 4).double()
    x[2] = torch.nan
    expected = alone(model, x)
    rows = persample.grad(losses_of(model(x), None), list(model.parameters()))
    assert_same(dict(zip(expected, rows, strict=True)), expected)
    assert_same(persample.per_sample(model, losses_of, x, chunk_size=2).grads(), expected)


def test_grad_through_a_checkpoint_that_leads_to_rows_in_another_order() -> None:
    """Nothing can stand in for what a checkpoint computes anew, so NaN is all that its passes show of a sample."""
    body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model = Model(
        lambda m, x: placed(m, checkpoint(m.body, x, use_reentrant=False)), body=body, lin=nn.Linear(4, 2)
    ).double()
    x = torch.randn(5, 3, 4).double()
    x[3] = torch.nan
    expected = alone(model, x)
    rows = persample.grad(losses_of(model(x), None), list(model.parameters()))
    assert_same(dict(zip(expected, rows, strict=True)), expected)


def test_grad_through_a_spectrum() -> None:
    model = Model(lambda m, x: torch.view_as_real(torch.fft.fft(x * m.p)).flatten(2), p=torch.randn(4)).double()
    x = torch.randn(5, 3, 4).double()
    x[1] = torch.inf
    expected = alone(model, x)
    assert_same({"p": persample.grad(losses_of(model(x), None), model.p)[0]}, expected)


def test_a_fault_in_another_sample_is_still_seen() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * w

        @staticmethod
        def backward(ctx: Any, z: Tensor) -> Any:  # type: ignore[override]
            (x,) = ctx.saved_tensors
            return None, (x * z + 1).sum(0)  # not linear in z

    w, x = torch.ones(2, dtype=torch.float64, requires_grad=True), torch.randn(3, 2).double()
    x[1, 0] = torch.nan
    with pytest.raises(persample.CheckError):
        persample.grad(Doubled.apply(x, w).sum(1), w)


def test_numbers_stand_in_for_a_time_and_nothing_is_written() -> None:
    x = torch.tensor([1.0, torch.nan, torch.inf, 2.0], requires_grad=True)
    y = (x * x.detach()).exp()
    graph, kept = trace(y), x.detach().clone()

    def passed() -> Tensor:
        return torch.autograd.grad(y.sum(), x, retain_graph=True)[0]

    before = passed()
    with stand_ins(graph.order):
        during = passed()
    assert during.isfinite().all()
    torch.testing.assert_close(during[[0, 3]], before[[0, 3]], rtol=0, atol=0)
    torch.testing.assert_close(passed(), before, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x.detach(), kept, rtol=0, atol=0, equal_nan=True)


def test_a_tensor_that_is_modified_later_is_still_noticed() -> None:
    x = torch.randn(3, requires_grad=True)
    y = x.exp()
    with stand_ins(trace(y).order):
        pass
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
