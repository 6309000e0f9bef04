"""Opacus trains models that are wrapped here: the same step and ε where it covers them, the loop's step where not."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import loop_grads, norms, rel_err
from private_training import BEYOND, BOUND, Recurrent, convnet, expected, losses_of, private, step
from torch import nn
from torch.nn.functional import cross_entropy

from persample.opacus import GradSampleModule

opacus = pytest.importorskip("opacus")
from opacus.utils.batch_memory_manager import BatchMemoryManager  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore::UserWarning:opacus", "ignore::DeprecationWarning:opacus"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Full backward hook is firing"),
]
forms = pytest.mark.parametrize("ghost", [False, True], ids=["hooks", "ghost"])


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


def test_another_bound_than_that_of_the_noise_is_refused() -> None:
    model, x, y = convnet(), torch.randn(8, 1, 6, 6), torch.randint(4, (8,))
    _, module, optimizer, criterion, _ = private(model, x, y, ghost=True, max_grad_norm=2 * BOUND)
    with pytest.raises(ValueError, match=r"clips to max_grad_norm=0\.3, and the noise is made for 0\.6"):
        criterion(module(x), y).backward()
    optimizer.max_grad_norm = BOUND
    criterion(module(x), y).backward()
    assert copy.deepcopy(module).get_clipping_coef is not module.get_clipping_coef
