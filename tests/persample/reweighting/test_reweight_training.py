"""reweight: the ways in which a model is trained, and left alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from weighting import FACTORS, B, assert_same, fixed, gradients, rows_of, weighted

from persample.reweighting import LayerGrads, reweight

pytestmark = pytest.mark.usefixtures("double")


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(B, 3, requires_grad=True)
    model = Checkpointed(inner, reentrant)
    expected = weighted(rows_of(inner, x.detach()), FACTORS)
    axes = {"inner.0": 0, "inner.2": 0} if reentrant else None
    with reweight(model, fixed, batch_axis=axes):
        for _ in range(2):
            inner.zero_grad()
            model(x).sin().sum().backward()
            assert_same(gradients(inner), expected)


def test_accumulation_and_repeated_backward() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(2 * B, 3)
    expected = [weighted(rows_of(model, part), FACTORS) for part in x.split(B)]
    with reweight(model, fixed):
        losses = [model(part).sin().sum() for part in x.split(B)]  # both forward passes before either backward
        sum(losses).backward(retain_graph=True)
        assert_same(gradients(model), {name: expected[0][name] + expected[1][name] for name in expected[0]})
        model.zero_grad()
        losses[0].backward()
        assert_same(gradients(model), expected[0])


def test_no_grad_eval_and_unused_forward_passes_leave_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), torch.randn(B, 3)
    asked: list[str] = []
    with reweight(model, lambda layer, grads: asked.append(layer)):
        with torch.no_grad():
            assert not model(x).requires_grad
        with torch.inference_mode():
            model(x)
        model.eval()
        model(x[:1])
        model(x[:3])
        assert not asked
        assert all(parameter.requires_grad for parameter in model.parameters())
        model(x).sum().backward()
    assert asked == ["2", "0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_model(dtype: torch.dtype) -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 3)), torch.randn(B, 8)
    low = copy.deepcopy(model).to(dtype)
    x = x.to(dtype).double()
    model.load_state_dict(low.state_dict())
    with reweight(low, lambda layer, grads: grads.gram().diagonal() * 0 + FACTORS.float()):
        low(x.to(dtype)).float().sin().sum().backward()
    assert all(parameter.grad.dtype == dtype for parameter in low.parameters())
    got = {name: grad.double() for name, grad in gradients(low).items()}
    assert_same(got, weighted(rows_of(model, x), FACTORS), tolerance=5e-2)


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside autocast"])
def test_autocast(inside: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 3)).float()
    x = torch.randn(B, 1, 5, 5).bfloat16().float()
    expected = weighted(rows_of(model, x), FACTORS.float())
    grams = []

    def policy(layer: str, grads: LayerGrads) -> Tensor:
        grams.append(grads.gram())
        return FACTORS.float()

    with reweight(model, policy):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().sin().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    assert all(gram.dtype == torch.float32 for gram in grams)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert_same(gradients(model), expected, tolerance=5e-2)


def test_an_exception_in_the_forward_pass_restores_the_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with reweight(model, fixed):
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.randn(B, 7))
        assert all(parameter.requires_grad for parameter in model.parameters())
        # Ctrl-C runs no hooks; the next call, or the end, puts it right.
        before = next(iter(model[0]._forward_pre_hooks.values()))
        before(model[0], (), {})
        assert not model[0].weight.requires_grad
        model(torch.randn(B, 3)).sum().backward()
        assert model[0].weight.requires_grad
        before(model[0], (), {})
    assert model[0].weight.requires_grad


def test_copies_and_pickles_are_inert() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(B, 3)
    asked: list[str] = []
    with reweight(model, lambda layer, grads: asked.append(layer)):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for other in copies:
            other(x).sum().backward()
        assert not asked
        model(x).sum().backward()
        assert asked
        for other in copies:
            assert_same(gradients(other), gradients(model))
            reweight(other, fixed).remove()  # and they can be reweighted on their own


def test_remove() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(B, 3)
    model(x).sin().sum().backward()
    expected = gradients(model)
    handle = reweight(model, fixed)
    handle.remove()
    handle.remove()
    model.zero_grad()
    model(x).sin().sum().backward()
    assert_same(gradients(model), expected)
    assert not model._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_batch_norm_rows_add_up_to_the_batch_gradient() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(27, 2))
    x = torch.randn(B, 1, 5, 5)
    model(x).sin().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    with reweight(model, lambda layer, grads: torch.ones(B)):
        model(x).sin().sum().backward()
    assert_same(gradients(model), expected)


def test_functorch_inside_is_left_alone() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(B, 3)
    params = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (sample[None],)).sin().sum()

    rows = rows_of(model, x)
    with reweight(model, fixed):
        got = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    assert_same(got, rows)


@pytest.mark.filterwarnings("ignore")  # Dynamo warns about the shape checks that only tests install
def test_torch_compile() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(B, 3)
    expected = weighted(rows_of(model, x), FACTORS)
    with reweight(model, fixed):
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            model.zero_grad()
            compiled(x).sin().sum().backward()
            assert_same(gradients(model), expected)
