"""Optimisers under torch.compile, the model traced as users have it: the run is that of a plain loop.

Run by `test_fngd_compile` in a process of its own: Dynamo cannot trace the shape checks of the other tests.
"""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from loops import METHODS, STEPS_PER_EPOCH, build_model, data, deviation, gradients
from torch.nn import functional as F

from fngd import FNGD, KFAC, NGD

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile warns about things of its own
IN_EVERY_RUN = ("fngd", "kfac")
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch's inductor needs a C++ compiler, g++")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("method", "backend"),
    [pytest.param(name, "aot_eager", marks=[] if name in IN_EVERY_RUN else pytest.mark.slow) for name in METHODS]
    + [pytest.param("fngd", "inductor", marks=[pytest.mark.slow, COMPILER])],
)
def test_a_run_is_the_same(method: str, backend: str) -> None:
    first, (x, y) = build_model(), data()
    second = copy.deepcopy(first)
    opts = [METHODS[method](net) for net in (first, second)]
    for number in range(STEPS_PER_EPOCH + 2):  # computed and stored coefficients
        for call, opt in zip((first, torch.compile(second, backend=backend)), opts, strict=True):
            opt.zero_grad()
            if hasattr(opt, "next_batch") and getattr(opt._table, "share", None) == "sample":
                opt.next_batch(torch.arange(16) + number)
            outputs = call(x)
            if method == "ngd true":
                opt.sample(outputs)
            loss = F.cross_entropy(outputs, y)
            loss.backward()
            opt.step()
            if getattr(opt, "measuring", False):
                opt.adapt(loss, F.cross_entropy(call(x), y))
    assert deviation(dict(second.named_parameters()), dict(first.named_parameters())) < 1e-4
    assert deviation(gradients(second), gradients(first)) < 1e-3


@pytest.mark.parametrize("by", ["backward", "autograd.grad"])
def test_passes_whose_gradients_are_thrown_away(by: str) -> None:
    """A generator's pass through the compiled model is no part of the step; one by autograd.grad always counts."""
    counted = []
    for compiled in (False, True):
        model, (x, y) = build_model(), data()
        opt = FNGD(model, lr=0.05, steps_per_epoch=2)
        call = torch.compile(model, backend="aot_eager") if compiled else model
        for _ in range(5):
            for _ in range(2):
                loss = F.cross_entropy(call(x), y)
                if by == "backward":
                    model.zero_grad()
                    loss.backward()
                else:
                    parameters = list(model.parameters())
                    for param, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                        param.grad = grad if param.grad is None else param.grad + grad
            opt.step()
            opt.zero_grad()
        counted.append({number for _, number in opt._table._rows})
        assert all(param.isfinite().all() for param in model.parameters())
    assert counted[0] == counted[1] == ({0} if by == "backward" else {0, 1})


@pytest.mark.parametrize("method", ["joint", "kfac"])
def test_gradients_of_the_inputs_alone_are_no_pass(method: str) -> None:
    """An adversarial example's: the compiled graph computes all gradients, of which none is for the weights."""
    results = []
    for compiled in (False, True):
        model, (x, y) = build_model(), data()
        opt = NGD(model, lr=0.05, accumulate="joint") if method == "joint" else KFAC(model, lr=0.05, inverse_every=1)
        call = torch.compile(model, backend="aot_eager") if compiled else model
        for _ in range(3):
            own = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(call(own), y), own)
            F.cross_entropy(call(x + 0.1 * grad.sign()), y).backward()
            opt.step()
            opt.zero_grad()
        results.append(dict(model.named_parameters()))
    assert deviation(results[1], results[0]) < 1e-4


@pytest.mark.parametrize("method", ["kfac", "shampoo", "ngd true", "ngd network"])
def test_a_compiled_step_counts(method: str) -> None:
    """Dynamo drops what a traced step assigns to the optimiser: when statistics are due, where random labels are.

    Where its `backward()` asks one policy for all layers, Dynamo may not look into that.
    """
    models = []
    for compiled in (False, True):
        model, (x, y) = build_model(), data()
        opt = NGD(model, lr=0.05, gram="network") if method == "ngd network" else METHODS[method](model)

        def train(model=model, opt=opt, x=x, y=y) -> None:
            outputs = model(x)
            if method == "ngd true":
                opt.sample(outputs)
            F.cross_entropy(outputs, y).backward()
            opt.step()
            opt.zero_grad()

        step = torch.compile(train, backend="eager") if compiled else train
        for _ in range(6):
            step()
        models.append(dict(model.named_parameters()))
    assert deviation(models[1], models[0]) < 1e-5
