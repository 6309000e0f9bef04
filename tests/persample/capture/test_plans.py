"""Plans: made once, followed where their layout is proven for another size, and not kept where a check fails."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from oracle import loop_grads, norms
from torch import Tensor, nn
from torch.nn import functional as F

import persample
from persample.attribution.proof.proven import proven
from persample.capture.plans import plans_of
from persample.graph.nodes import trace


def test_plans_are_made_once_and_go_with_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for _ in range(3):
        persample.per_sample(model, lambda out, _: out.square().sum(1), torch.randn(5, 3).double())
    plans = list(plans_of(model)._plans.values())
    assert len(plans) == 1
    assert plans[0].calls == 2
    assert plans[0].owners is not None


class Sequences(nn.Module):
    """Attention, a recurrent layer over time first, and a head on all positions as one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm, self.head = nn.Embedding(7, 4), nn.GRU(4, 6), nn.Linear(6, 3)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.lstm(self.block(self.table(x)).transpose(0, 1))[0].transpose(0, 1)
        return self.head(steps.flatten(0, 1)).view(*x.shape, 3)


def squares(outputs: Tensor, targets: Any) -> Tensor:
    return outputs.square().flatten(1).sum(1)


@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_other_sizes_follow_a_proven_plan(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Poisson-sampled batches, sequences of any length: the layout is proven for each size, and nothing is probed."""
    if kind == "images":
        first = nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        model: nn.Module = nn.Sequential(*first, nn.Linear(12, 2)).double()
        shapes = [(4, 2, 5, 5), (7, 2, 5, 5), (3, 2, 9, 6), (4, 2, 4, 4), (2, 2, 5, 5), (4, 2, 5, 5)]
        batches = [torch.randn(shape).double() for shape in shapes]
    else:
        model = Sequences().double()
        shapes = [(4, 3), (5, 5), (3, 4), (2, 1), (6, 3), (3, 6)]
        batches = [torch.randint(7, shape) for shape in shapes]
    for number, x in enumerate(batches):
        expected = loop_grads(model, squares, x, None)
        for _ in range(2):
            found = persample.per_sample(model, squares, x)
            for name, rows in found.grads().items():
                torch.testing.assert_close(rows, expected[name])
            torch.testing.assert_close(found.norms(), norms(expected))
        if not number and kind == "images":  # a recurrent layer has another graph for each length
            monkeypatch.setattr(importlib.import_module("persample.capture.analysis"), "find_uses", None)


@pytest.mark.parametrize("batch_first", [False, True])
def test_recurrence_that_is_one_operation(batch_first: bool) -> None:
    """In single precision, on a CPU: steps are mixed and samples are apart, at any length."""
    layer, axis = nn.LSTM(3, 4, batch_first=batch_first), 0 if batch_first else 1
    head = nn.Linear(4, 2)
    for sizes in ((4, 3), (5, 6), (4, 2)):
        x = torch.randn(sizes if batch_first else sizes[::-1]).unsqueeze(-1).repeat(1, 1, 3)
        outputs = head(layer(x)[0])
        losses = outputs.square().sum((1 - axis, 2))
        graph = trace(losses)
        uses = [node for node in graph.order if "RnnLayer" in node.name() or "Addmm" in node.name()]
        found = proven(graph, uses, sizes[0])
        assert found is not None
        recurrent = [at for (node, _), at in found.items() if "RnnLayer" in node.name()]
        assert recurrent
        assert all(at.inner == 1 for at in recurrent)
        rows = persample.grad(losses, layer.parameters())
        for b in (0, sizes[0] - 1):
            alone = torch.autograd.grad(losses[b], list(layer.parameters()), retain_graph=True)
            for row, expected in zip(rows, alone, strict=True):
                torch.testing.assert_close(row[b], expected, rtol=1e-4, atol=1e-5)


def test_sizes_at_which_samples_mix_are_refused() -> None:
    """The same operations and another batch: what is proven for eight samples does not hold for six."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x).reshape(4, -1, 2).tanh().flatten(0, 1).reshape(len(x), -1)

    class Mixing(Pairs):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).reshape(2, -1).cumsum(1).reshape(len(x), -1)

    model = Pairs().double()
    for size in (8, 4, 12, 8):
        x = torch.randn(size, 3).double()
        rows = persample.per_sample(model, squares, x).grads()
        torch.testing.assert_close(rows["lin.weight"], loop_grads(Alone(model), squares, x, None)["model.lin.weight"])
    with pytest.raises(persample.CoupledSamplesError):
        persample.per_sample(Mixing().double(), squares, torch.randn(8, 3).double())


class Alone(nn.Module):
    """A model that cannot run on one sample, as if it could."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.expand(4, -1))[:1] if len(x) == 1 else self.model(x)


def test_a_refused_batch_leaves_no_plan() -> None:
    """A hook inside changes the gradient of the sum alone: refused the first time and every time after."""
    weight = nn.Parameter(torch.randn(3, 5).double())

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            doubled = self.weight * 2
            doubled.register_hook(lambda g: 3 * g)
            return x @ doubled.T

    model = Hooked()
    for _ in range(3):
        with pytest.raises(persample.CheckError):
            persample.per_sample(model, lambda out, _: out.square().sum(1), torch.randn(4, 5).double())


def test_gradient_hooks_of_parameters_are_refused() -> None:
    model = nn.Linear(5, 3)
    model.weight.register_hook(lambda g: 2 * g)
    with pytest.raises(persample.UnsupportedError, match="'weight' has gradient hooks"):
        persample.per_sample(model, lambda out, _: out.square().sum(1), torch.randn(4, 5))


def test_reentrant_checkpoints_and_nested_tensors_are_refused_in_words() -> None:
    from torch.utils.checkpoint import checkpoint

    layer = nn.Linear(5, 3)
    losses = checkpoint(lambda x: layer(x).square(), torch.randn(4, 5, requires_grad=True), use_reentrant=True).sum(1)
    outer = nn.Parameter(torch.ones(()))
    with pytest.raises(persample.UnsupportedError, match="use_reentrant=False"):
        persample.grad(losses * outer.square(), [*layer.parameters(), outer])


def test_custom_functions_that_leave_out_zero_gradients() -> None:
    class Sometimes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)  # type: ignore[attr-defined]
            return x * w

        @staticmethod
        def backward(ctx: object, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
            x, w = ctx.saved_tensors  # type: ignore[attr-defined]
            return (None, None) if g.abs().sum() == 0 else (g * w, (g * x).sum(0))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5).double())

        def forward(self, x: Tensor) -> Tensor:
            return Sometimes.apply(x, self.w)

    x, scale = torch.randn(3, 5).double(), torch.tensor([1.0, 0.0, 2.0]).double()
    found = persample.per_sample(Model(), lambda out, s: s * out.sum(1), x, scale).grads()["w"]
    torch.testing.assert_close(found, scale[:, None] * x)


class Computed(nn.Module):
    """An operation whose weight and bias are computed from parameters, with as many entries as there are samples."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first = kind, nn.Conv2d(4, 4, 1)
        self.scale, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x, weight, bias = self.first(x), self.scale.exp(), self.shift.exp()
        if self.kind == "convolution":
            return F.conv2d(x, self.kernel * weight.view(4, 1, 1, 1), bias)
        if self.kind == "layer norm":
            return F.layer_norm(x, (4,), weight, bias)
        if self.kind == "group norm":
            return F.group_norm(x, 2, weight, bias)
        return F.batch_norm(x, self.mean, self.var, weight, bias)


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("kind", ["convolution", "layer norm", "group norm", "batch norm"])
def test_computed_weights_are_not_taken_for_samples(kind: str, first: int) -> None:
    """After a batch of one sample, which is apart even in operations on parameters alone: the last of an epoch."""
    torch.manual_seed(0)
    model = Computed(kind).double()
    for batch in (first, first, 4, 4, 3):
        x = torch.randn(batch, 4, 4, 4).double()
        expected = loop_grads(model, squares, x, None)
        for name, rows in persample.per_sample(model, squares, x).grads().items():
            torch.testing.assert_close(rows, expected[name], msg=f"{name} of {batch}")


def test_what_one_sample_has_taught_is_not_for_several() -> None:
    """Samples that are mixed before a weight meets them cannot be told from one that is alone."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * (self.weight * x.mean(0))

    model = Centred().double()
    persample.per_sample(model, squares, torch.randn(1, 4).double()).grads()
    assert not plans_of(model)._of_structure
    with pytest.raises(persample.CoupledSamplesError):
        persample.per_sample(model, squares, torch.randn(3, 4).double())


def test_places_of_samples_are_proven_for_data_alone() -> None:
    """Axis 0 of a weight has as many entries as the batch, by chance."""
    x, weight = torch.randn(4, 4, 5, 5, requires_grad=True), torch.randn(4, 4, 3, 3, requires_grad=True)
    scale = torch.randn(4, requires_grad=True)
    for out in (
        F.conv2d(x, weight.exp()),
        F.group_norm(x, 2, scale.exp()),
        F.layer_norm(x.mean((2, 3)), (4,), scale.exp()),
        F.batch_norm(x, torch.zeros(4), torch.ones(4), scale.exp()),
    ):
        graph = trace(out.flatten(1).sum(1))
        [cut] = [node for node in graph.order if node.name() == "ExpBackward0"]
        assert proven(graph, [cut], 4) is None
