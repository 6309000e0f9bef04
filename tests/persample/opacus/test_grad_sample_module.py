"""Opacus trains models that are wrapped here: the same step and ε where it covers them, the loop's step where not."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import loop_grads, norms, rel_err
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from torch.utils.data import DataLoader, TensorDataset

import persample
from persample.opacus import GradSampleModule

opacus = pytest.importorskip("opacus")
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping  # noqa: E402
from opacus.utils.batch_memory_manager import BatchMemoryManager  # noqa: E402
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore::UserWarning:opacus", "ignore::DeprecationWarning:opacus"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Full backward hook is firing"),
]
forms = pytest.mark.parametrize("ghost", [False, True], ids=["hooks", "ghost"])
BOUND = 0.3


def convnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 4))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU] = nn.LSTM, batch_first: bool = True) -> None:
        super().__init__()
        self.rnn, self.last = kind(6, 5, batch_first=batch_first), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.rnn(x)[0]
        return self.last(out[:, -1] if self.rnn.batch_first else out[-1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.last = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(x, x, x, need_weights=False)[0].mean(1))


class Tied(nn.Module):
    """A table that is the output layer, too, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.inner(self.inner(self.table(tokens)).tanh()).mean(1)
        return hidden @ self.table.weight.T


class Bare(nn.Module):
    """A parameter that no layer owns, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.spare, self.last = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(2)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.mean(1) * self.scale)


def steps(batch: int = 8) -> Tensor:
    return torch.randn(batch, 7, 6)


def tokens(batch: int = 8) -> Tensor:
    return torch.randint(9, (batch, 7))


BEYOND: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any]]] = {
    "lstm": (Recurrent, steps, {}),
    "gru": (lambda: Recurrent(nn.GRU), steps, {}),
    "lstm-time-first": (
        lambda: Recurrent(batch_first=False),
        lambda: torch.randn(7, 8, 6),
        {"batch_first": False},
    ),
    "attention": (Attention, steps, {}),
    "tied": (Tied, tokens, {}),
    "bare": (Bare, steps, {}),
    "convnet": (convnet, lambda: torch.randn(8, 1, 6, 6), {}),
}


def losses_of(outputs: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs, y, reduction="none")


def private(
    model: nn.Module, x: Tensor, y: Tensor, *, ghost: bool, ours: bool = True, rate: float = 0.1, **options: Any
) -> tuple[Any, Any, Any, Any, Any]:
    """Engine, model, optimizer, criterion and loader of one data set."""
    engine = opacus.PrivacyEngine()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=rate)
    own = {k: v for k, v in options.items() if k in ("batch_first", "loss_reduction")}
    module = GradSampleModule(model, ghost=ghost, max_grad_norm=BOUND if ghost else None, **own) if ours else model
    more = {"grad_sample_mode": "ghost", "criterion": nn.CrossEntropyLoss()} if ghost else {}
    arguments = {"noise_multiplier": 1.0, "max_grad_norm": BOUND, **more, **options}
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    module, optimizer, *criterion, loader = engine.make_private(
        module=module, optimizer=optimizer, data_loader=loader, **arguments
    )
    return engine, module, optimizer, *(criterion or [nn.CrossEntropyLoss()]), loader


def step(model: nn.Module, x: Tensor, y: Tensor, *, ghost: bool, **options: Any) -> dict[str, Tensor]:
    """Σ_b min(1, C / ‖g_b‖) g_b as Opacus' optimizer makes it, without noise."""
    reduction = options.setdefault("loss_reduction", "sum")
    module = GradSampleModule(model, ghost=ghost, max_grad_norm=BOUND if ghost else None, **options)
    kind = DPOptimizerFastGradientClipping if ghost else DPOptimizer
    optimizer = kind(
        torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=0.0, max_grad_norm=BOUND,
        expected_batch_size=len(y), loss_reduction=reduction,
    )  # fmt: skip
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    if ghost:
        criterion = DPLossFastGradientClipping(module, optimizer, criterion, reduction)
    for _ in range(3):  # by the plan of the first one
        optimizer.zero_grad()
        criterion(module(x), y).backward()
    optimizer.pre_step()
    scale = len(y) if reduction == "mean" else 1
    return {name: p.grad * scale for name, p in model.named_parameters()}


def expected(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    rows = loop_grads(model, losses_of, x, y)
    factors = (BOUND / (norms(rows) + 1e-6)).clamp(max=1)  # Opacus' own
    assert factors.min() < 1
    return {name: torch.einsum("b,b...->...", factors, each) for name, each in rows.items()}


@forms
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", BEYOND)
def test_the_clipped_sum_is_that_of_the_loop(name: str, reduction: str, ghost: bool) -> None:
    make, data, options = BEYOND[name]
    torch.manual_seed(0)
    model, x, y = make(), data(), torch.randint(4, (8,))
    want = expected(model, x, y)
    assert rel_err(step(model, x, y, ghost=ghost, loss_reduction=reduction, **options), want) < 1e-9


@forms
def test_training_is_that_of_opacus(ghost: bool) -> None:
    """Its sampling, noise and accountant: the same parameters after two epochs, and the same ε."""
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model, x, y = convnet(), torch.randn(40, 1, 6, 6), torch.randint(4, (40,))
        noise = torch.Generator().manual_seed(1)
        engine, module, optimizer, criterion, loader = private(
            model, x, y, ghost=ghost, ours=ours, noise_generator=noise
        )
        assert type(module) in (opacus.GradSampleModule, opacus.GradSampleModuleFastGradientClipping)
        for _ in range(2):
            for inputs, targets in loader:
                optimizer.zero_grad()
                criterion(module(inputs), targets).backward()
                optimizer.step()
        found.append((engine.get_epsilon(1e-5), {name: p.detach() for name, p in model.named_parameters()}))
    (epsilon, parameters), (theirs, reference) = found
    assert epsilon == theirs
    assert rel_err(parameters, reference) < 1e-9


@forms
@pytest.mark.parametrize("name", ["lstm", "tied", "attention"])
def test_models_that_opacus_refuses_or_gets_wrong_train_with_its_engine(name: str, ghost: bool) -> None:
    make, data, options = BEYOND[name]
    torch.manual_seed(0)
    model = make()
    x, y = torch.cat([data() for _ in range(5)]), torch.randint(4, (40,))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine, module, optimizer, criterion, loader = private(model, x, y, ghost=ghost, **options)
    for inputs, targets in loader:
        optimizer.zero_grad()
        criterion(module(inputs), targets).backward()
        optimizer.step()
    assert 0 < engine.get_epsilon(1e-5) < 100
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_opacus_still_refuses_what_is_not_ours() -> None:
    x, y = torch.randn(40, 7, 6), torch.randint(4, (40,))
    private(Recurrent(), x, y, ghost=False)
    with pytest.raises(opacus.validators.errors.UnsupportedModuleError, match=r"nn\.LSTM"):
        private(Recurrent(), x, y, ghost=False, ours=False)
    normed = nn.Sequential(nn.Flatten(), nn.Linear(42, 4), nn.BatchNorm1d(4))
    with pytest.raises(opacus.validators.errors.UnsupportedModuleError, match="BatchNorm"):
        private(normed, x, y, ghost=False)


@forms
def test_large_batches_in_parts(ghost: bool) -> None:
    """BatchMemoryManager: the step of a batch that was cut is that of the batch."""
    found = []
    for largest in (3, 100):
        torch.manual_seed(0)
        model, x, y = Recurrent(), torch.randn(40, 7, 6), torch.randint(4, (40,))
        _, module, optimizer, criterion, loader = private(model, x, y, ghost=ghost, noise_multiplier=0.0)
        torch.manual_seed(2)
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=largest, optimizer=optimizer) as parts:
            for inputs, targets in parts:
                assert len(inputs) <= largest
                optimizer.zero_grad()
                criterion(module(inputs), targets).backward()
                optimizer.step()
        found.append({name: p.detach() for name, p in model.named_parameters()})
    assert rel_err(found[0], found[1]) < 1e-9


@forms
def test_a_batch_of_none(ghost: bool) -> None:
    """Poisson sampling draws some; the loss, a mean over nothing, is NaN, and the step is noise."""
    model, x, y = convnet(), torch.randn(8, 1, 6, 6), torch.randint(4, (8,))
    _, module, optimizer, criterion, _ = private(model, x, y, ghost=ghost, noise_multiplier=0.0)
    for batch in (8, 0):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        criterion(module(x[:batch]), y[:batch]).backward()
        optimizer.step()
        assert all(torch.equal(p, before[name]) == (not batch) for name, p in model.named_parameters())


@pytest.mark.parametrize("forbidden", [False, True])
def test_accumulated_batches(forbidden: bool) -> None:
    model, x, y = convnet(), torch.randn(2, 8, 1, 6, 6), torch.randint(4, (2, 8))
    module = GradSampleModule(model)
    if forbidden:
        module.forbid_grad_accumulation()
    cross_entropy(module(x[0]), y[0]).backward()
    if forbidden:
        with pytest.raises(ValueError, match="BatchMemoryManager"):
            cross_entropy(module(x[1]), y[1]).backward()
        return
    cross_entropy(module(x[1]), y[1]).backward()
    for k in range(2):
        want = loop_grads(model, losses_of, x[k], y[k])
        assert rel_err({name: p.grad_sample[k] for name, p in model.named_parameters()}, want) < 1e-9


@forms
def test_two_views_of_each_sample(ghost: bool) -> None:
    """Passes that meet in one loss are parts of one gradient."""
    model, x, y = convnet(), torch.randn(2, 8, 1, 6, 6), torch.randint(4, (8,))
    rows = loop_grads(model, lambda _, y: losses_of(model(x[0]) + model(x[1]), y), x[0], y)
    module = GradSampleModule(model, ghost=ghost, max_grad_norm=BOUND if ghost else None)
    spare = module(x[0])  # never differentiated
    del spare
    loss = cross_entropy(module(x[0]) + module(x[1]), y)
    loss.backward(retain_graph=ghost)
    if not ghost:
        assert rel_err({name: p.grad_sample for name, p in model.named_parameters()}, rows) < 1e-9
        return
    assert rel_err(module.get_norm_sample(), norms(rows)) < 1e-9


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


def test_another_bound_than_that_of_the_noise_is_refused() -> None:
    model, x, y = convnet(), torch.randn(8, 1, 6, 6), torch.randint(4, (8,))
    _, module, optimizer, criterion, _ = private(model, x, y, ghost=True, max_grad_norm=2 * BOUND)
    with pytest.raises(ValueError, match=r"clips to max_grad_norm=0\.3, and the noise is made for 0\.6"):
        criterion(module(x), y).backward()
    optimizer.max_grad_norm = BOUND
    criterion(module(x), y).backward()
    assert copy.deepcopy(module).get_clipping_coef is not module.get_clipping_coef
