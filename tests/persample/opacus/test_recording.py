"""What is recorded of a pass under Opacus: new graphs, coupled samples, copies, other outputs; what is refused."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from oracle import loop_grads, rel_err
from private_training import BEYOND, BOUND, convnet, expected, losses_of, step, steps
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

import persample
from persample.opacus import GradSampleModule

opacus = pytest.importorskip("opacus")

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore::UserWarning:opacus", "ignore::DeprecationWarning:opacus"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Full backward hook is firing"),
]
forms = pytest.mark.parametrize("ghost", [False, True], ids=["hooks", "ghost"])


def test_two_passes_on_other_numbers_of_samples_are_refused() -> None:
    module = GradSampleModule(convnet())
    loss = module(torch.randn(8, 1, 6, 6)).square().mean() + module(torch.randn(4, 1, 6, 6)).square().mean()
    with pytest.raises(persample.PerSampleError, match=r"passes with \[4, 8\] samples|passes with \[8, 4\] samples"):
        loss.backward()


class Branching(nn.Module):
    """Takes another way on request, and drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.longer = nn.Linear(6, 6), nn.Linear(6, 4), False

    def forward(self, x: Tensor) -> Tensor:
        hidden = dropout(self.first(x.mean(1)).tanh(), 0.5)
        return self.second(dropout(self.first(hidden), 0.5) if self.longer else hidden)


def test_a_new_graph_runs_again_from_the_same_random_numbers() -> None:
    model = Branching()
    module, x, y = GradSampleModule(model), steps(), torch.randint(4, (8,))
    for longer in (False, False, False, True, True, False):
        model.longer = longer
        torch.manual_seed(3)
        want = loop_grads(model, losses_of, x, y)
        after = torch.rand(3)
        torch.manual_seed(3)
        module.zero_grad()
        outputs = module(x)
        torch.testing.assert_close(torch.rand(3), after)
        state = torch.get_rng_state()
        cross_entropy(outputs, y).backward()
        assert torch.equal(torch.get_rng_state(), state)
        assert rel_err({name: p.grad_sample for name, p in model.named_parameters()}, want) < 1e-9


def test_samples_that_couple_are_refused() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.inner(x.mean(1))
            return (hidden - hidden.mean(0)).sigmoid()

    module = GradSampleModule(Centred())
    for _ in range(2):
        with pytest.raises(persample.CoupledSamplesError, match="influence each other"):
            cross_entropy(module(steps()), torch.randint(4, (8,))).backward()
    assert all(p.grad_sample is None for p in module.parameters())


def test_inputs_get_their_gradient() -> None:
    model, x, y = convnet(), torch.randn(8, 1, 6, 6, requires_grad=True), torch.randint(4, (8,))
    [want] = torch.autograd.grad(cross_entropy(model(x), y), x)
    cross_entropy(GradSampleModule(model)(x), y).backward()
    torch.testing.assert_close(x.grad, want)
    assert all(p.grad is None for p in model.parameters())


def test_as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the capture runs inside the backward pass, in its thread."""
    monkeypatch.setattr("persample.opacus.recording.outside", lambda function, *arguments: function(*arguments))
    for name in ("tied", "bare", "attention"):
        make, data, options = BEYOND[name]
        model, x, y = make(), data(), torch.randint(4, (8,))
        assert rel_err(step(model, x, y, ghost=False, **options), expected(model, x, y)) < 1e-9


def test_evaluation_records_nothing() -> None:
    model, x = convnet(), torch.randn(8, 1, 6, 6)
    module = GradSampleModule(model)
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x))
    module.eval()
    module(x).sum().backward()
    assert model[0].weight.grad is not None
    assert model[0].weight.grad_sample is None


def test_copies_and_the_model_itself() -> None:
    model, x, y = convnet(), torch.randn(8, 1, 6, 6), torch.randint(4, (8,))
    module = GradSampleModule(model)
    want = loop_grads(model, losses_of, x, y)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module):
        cross_entropy(copied(x), y).backward()
        found = {name: p.grad_sample for name, p in copied._module.named_parameters()}
        assert rel_err(found, want) < 1e-9
    assert list(module.state_dict()) == [f"_module.{name}" for name in model.state_dict()]
    assert module.to_standard_module() is model
    assert not hasattr(model[0].weight, "grad_sample")


def test_outputs_of_several_shapes() -> None:
    """Of an LSTM whose hidden states have samples on axis 1."""
    model, x = nn.LSTM(6, 5, 2, batch_first=True), steps()

    def losses(outputs: Any, _: object) -> Tensor:
        return outputs[0].square().sum((1, 2)) + outputs[1][0].square().sum((0, 2))

    want = loop_grads(model, losses, x, None)
    losses(GradSampleModule(model, loss_reduction="sum")(x), None).sum().backward()
    assert rel_err({name: p.grad_sample for name, p in model.named_parameters()}, want) < 1e-9


def test_as_many_steps_as_samples() -> None:
    """What a length does not tell has to be said, until a batch of another size has told."""
    model = nn.GRU(6, 5)

    def rows(module: Any, x: Tensor) -> dict[str, Tensor]:
        module.zero_grad()
        module(x)[0].square().sum().backward()
        return {name: p.grad_sample for name, p in model.named_parameters()}

    def want(x: Tensor) -> dict[str, Tensor]:
        return loop_grads(model, lambda out, _: out[0].square().sum((0, 2)), x, None)

    square, other = torch.randn(7, 7, 6), torch.randn(7, 4, 6)
    module = GradSampleModule(model, batch_first=False, loss_reduction="sum")
    with pytest.raises(persample.PerSampleError, match=r"2 axes of 7 samples; give output_axis="):
        rows(module, square)
    for x in (other, square):
        assert rel_err(rows(module, x), want(x)) < 1e-9
    module = GradSampleModule(model, batch_first=False, loss_reduction="sum", output_axis=1)
    assert rel_err(rows(module, square), want(square)) < 1e-9


def test_what_makes_no_sense_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convnet()
    for options, words in [
        ({"loss_reduction": "none"}, "'mean' or 'sum'; got 'none'"),
        ({"ghost": True}, "max_grad_norm goes with ghost=True"),
        ({"max_grad_norm": 1.0}, "max_grad_norm goes with ghost=True"),
        ({"ghost": True, "max_grad_norm": -1.0}, "must be positive; got -1"),
    ]:
        with pytest.raises(ValueError, match=words):
            GradSampleModule(model, **options)
    with pytest.raises(persample.UnsupportedError, match="Train in one process"):
        GradSampleModule(nn.DataParallel(model))
    x, y = torch.randn(8, 1, 6, 6), torch.randint(4, (8,))
    module = GradSampleModule(model)
    loss = cross_entropy(module(x), y)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the model again"):
        loss.backward()
    with pytest.raises(persample.PerSampleError, match="Return what is of each sample"):
        GradSampleModule(type("Summed", (type(model),), {"forward": lambda self, x: self[0](x).mean()})(*model))(x)
    model[0].weight.requires_grad_(False)
    with pytest.raises(persample.PerSampleError, match=r"frozen or freed .*'0\.weight'"):
        module(x)
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    with pytest.raises(persample.UnsupportedError, match=r"pip install 'opacus>=1\.5'"):
        GradSampleModule(model)


def test_the_second_pass_must_be_the_first_one_clipped() -> None:
    model, x, y = convnet(), torch.randn(8, 1, 6, 6), torch.randint(4, (8,))
    module = GradSampleModule(model, ghost=True, max_grad_norm=BOUND)
    losses = losses_of(module(x), y)
    losses.mean().backward(retain_graph=True)
    module.disable_hooks()
    with pytest.raises(RuntimeError, match="not the first one with its samples clipped"):
        losses.sum().backward()
