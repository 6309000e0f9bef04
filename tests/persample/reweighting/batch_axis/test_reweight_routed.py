"""reweight: layers whose rows data place (experts, valid tokens, nodes of graphs) are read off the indices, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import loop_grads
from routing import MODELS, losses_of
from torch import Tensor, nn

import fngd
import persample
from persample import LayerGrads
from persample.testing import loop
from persample.testing.cases import CASES, call

pytestmark = pytest.mark.usefixtures("double")

READ_OFF = (
    "layer/AdaptiveLogSoftmaxWithLoss(6,9,[2,5])@4,6",
    "usage/used-by-some-samples-only",
    "layout/flipped-batch",
    "layout/sorted-batch",
    "layout/only-valid-tokens",
    "layout/scattered-by-index",
    "language/mixture of experts",
    "architecture/graph-network",
    "architecture/graph-attention",
    "architecture/graph-convolution-by-sparse-matrix",
)


class Recorder:
    """A policy of drawn factors, one for each sample, that keeps what it is asked about."""

    def __init__(self) -> None:
        self.asked: dict[str, LayerGrads] = {}

    def __call__(self, layer: str, grads: LayerGrads) -> Tensor:
        self.asked[layer] = grads
        return factors(grads.batch_size)


def factors(batch: int) -> Tensor:
    return torch.linspace(-1, 2, batch)


def check(model: nn.Module, recorder: Recorder, rows: dict[str, Tensor], handle: Any) -> set[str]:
    """Compares all that the policy was asked about with rows; returns the layers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for path, grads in recorder.asked.items():
        members = [names[id(each)] for each in handle._layers[path].members() if id(each) in names]
        if "for its calls alone" in handle.explain()[path] or not members:
            continue
        for name in members:
            expected = torch.tensordot(factors(len(rows[name])), rows[name], 1)
            torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=1e-9, atol=1e-11)
        flat = torch.cat([rows[name].flatten(1) for name in members], 1)
        if sum(each.numel() for each in handle._layers[path].members()) == flat.shape[1] and "[" not in path:
            torch.testing.assert_close(grads.norms(), flat.norm(dim=1), rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(grads.gram(), flat @ flat.T, rtol=1e-8, atol=1e-10)
    return set(recorder.asked)


@pytest.mark.parametrize("name", READ_OFF)
def test_cases_are_exact(name: str) -> None:
    case = next(each for each in CASES if each.name == name)
    model, loss_fn, inputs, targets = case.build()
    rows = loop.loop_grads(model, loss_fn, inputs, targets)
    model.zero_grad()
    recorder = Recorder()
    with persample.reweight(model, recorder, functions=True) as handle:
        loss_fn(call(model, inputs), targets).sum().backward()
        assert not [line for line in handle.explain().values() if "cannot" in line]
        check(model, recorder, rows, handle)
    linear = {path: each for path, each in model.named_modules() if isinstance(each, nn.Linear)}
    assert {path for path, each in linear.items() if each.weight.grad is not None} <= recorder.asked.keys()


@pytest.mark.parametrize("name", MODELS)
def test_every_batch_is_read_anew(name: str) -> None:
    model = MODELS[name]()
    recorder = Recorder()
    with persample.reweight(model, recorder, functions=True) as handle:
        for batch, length in ((6, 9), (6, 9), (4, 7), (6, 9)):
            words, targets = torch.randint(9, (batch, length)), torch.randint(3, (batch,))
            with handle.paused():
                rows = loop_grads(model, losses_of, words, targets)
            model.zero_grad()
            recorder.asked.clear()
            losses_of(model(words), targets).sum().backward()
            assert check(model, recorder, rows, handle)


@pytest.mark.parametrize("how", ["axis", "all entries", "flip", "index"])
def test_batches_in_another_order_inside(how: str) -> None:
    """Factors go to the sample whose output a row becomes; or, of rows that an index picks, it is said."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).tanh()
            picked = h[torch.tensor([2, 0, 3, 1, 4])]
            return self.last({"axis": h.roll(2, 0), "all entries": h.roll(-8), "flip": h.flip(0), "index": picked}[how])

    model, x = Turned(), torch.randn(5, 3)
    parameters, rows = dict(model.named_parameters()), []
    for loss in model(x).sin().sum(1):
        rows.append(torch.autograd.grad(loss, list(parameters.values()), retain_graph=True))
    expected = {name: torch.stack(each) for name, each in zip(parameters, zip(*rows, strict=True), strict=True)}
    recorder = Recorder()
    with persample.reweight(model, recorder) as handle:
        if how == "index":
            with pytest.raises(ValueError, match="rows that change with others than their own"):
                model(x).sin().sum().backward()
            return
        model(x).sin().sum().backward()
        assert check(model, recorder, expected, handle) == {"first", "last"}


def test_optimisers_train_experts_as_they_train_dense_layers() -> None:
    """NGD on modules of experts: the direction of each is that of its Gram matrix over the samples of the batch."""
    torch.manual_seed(1)
    case = next(each for each in CASES if each.name == "language/mixture of experts")
    model, loss_fn, inputs, targets = case.build()
    rows = loop.loop_grads(model, loss_fn, inputs, targets)
    model.zero_grad()
    optimizer = fngd.NGD(model, lr=1.0, momentum=0.0, alpha=0.1, scale="absorb", reduction="sum")
    loss_fn(call(model, inputs), targets).sum().backward()
    for path in ("experts.experts.0.0", "experts.experts.2.2"):
        flat = torch.cat([rows[f"{path}.{part}"].flatten(1) for part in ("weight", "bias")], 1)
        expected = flat.T @ fngd.smw_coefficients(flat @ flat.T, alpha=0.1)
        weight = model.get_submodule(path)
        found = torch.cat([weight.weight.grad.flatten(), weight.bias.grad])
        cosine = torch.nn.functional.cosine_similarity(found, expected, dim=0)
        assert cosine > 1 - 1e-9
    assert "where data place them" in optimizer.explain()["experts.experts.0.0"]
