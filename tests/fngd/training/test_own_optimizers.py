"""Anyone's optimiser beside ours: functions by name, closures, graphs of gradients, modes, and mistakes."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fngd.__main__ import main
from fngd.training import Config, data
from fngd.training.loop import Comparison, Runner
from fngd.training.recipes import build_optimizer, optimizer_spec
from fngd.training.rivals import MuonAndAdamW
from fngd.training.steps import optimizer_step

MODULE = '''
import torch
from torch.optim import SGD

from fngd.training import OptimizerSpec


def make(model, lr=0.03):
    return SGD(model.parameters(), lr=lr, momentum=0.9)


def knows(model, lr, config, steps_per_epoch):
    assert config.epochs and steps_per_epoch
    return SGD(model.parameters(), lr=lr)


def returns_nothing(model):
    return None


def fixed(model, rate=0.1):
    return SGD(model.parameters(), lr=rate)


SPEC = OptimizerSpec(lambda model, lr, config, steps: SGD(model.parameters(), lr=lr), 0.07, "of my own")
NUMBER = 3


class SAM(SGD):
    """Sharpness-aware minimisation, closure after a backward pass."""

    closure = True
    rho = 0.05

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None
        params = [p for group in self.param_groups for p in group["params"]]
        length = torch.stack([p.grad.norm() for p in params]).norm()
        moves = [self.rho * p.grad / length for p in params]
        for p, move in zip(params, moves):
            p.add_(move)
        closure()
        for p, move in zip(params, moves):
            p.sub_(move)
        super().step()
'''
SMALL = [
    "--train-size",
    "90",
    "--batch-size",
    "30",
    "--epochs",
    "2",
    "--seeds",
    "0,1,2",
    "--model",
    "mlp",
    "--no-memory",
]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_own_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_own_module", None)
    return "my_own_module"


def test_a_function_of_ones_own_is_compared(mine: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = f"sgd,{mine}:make,torch.optim:NAdam,{mine}:SPEC"
    options = ["--lr", f"{mine}:make=0.05", "--schedule", "cosine", "--weight-decay", "0"]
    assert main(["compare", "--optimizers", names, "--out", str(tmp_path / "out"), *options, *SMALL]) == 0
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["optimizer"] for row in content["summary"]] == names.split(",")
    sgd, own = (content["history"][name]["1"] for name in ("sgd", f"{mine}:make"))
    assert [each["train_loss"] for each in sgd] == [each["train_loss"] for each in own], "the same rule and rate"
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{mine}:make +0.00 ± 0.00 points over 3 seeds" in printed
    assert content["conclusion"] in printed


def test_rates_are_given_or_the_functions_own(mine: str) -> None:
    model = nn.Linear(2, 1)
    for lr, expected in (((), 0.03), (((f"{mine}:make", 0.5),), 0.5)):
        optimizer, _ = build_optimizer(f"{mine}:make", model, Config(lr=lr), steps_per_epoch=3)
        assert optimizer.param_groups[0]["lr"] == expected
    assert build_optimizer(f"{mine}:SPEC", model, Config(), steps_per_epoch=3)[0].param_groups[0]["lr"] == 0.07
    with_lr = Config(lr=((f"{mine}:knows", 0.2),))
    assert build_optimizer(f"{mine}:knows", model, with_lr, steps_per_epoch=3)[0].param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize(
    ("name", "lr", "message"),
    [
        ("nowhere.at.all:make", None, "cannot be imported: No module named 'nowhere'.*folder that the command runs in"),
        ("my_own_module:nothing", None, "cannot be imported: module 'my_own_module' has no attribute 'nothing'"),
        ("my_own_module:NUMBER", None, "is a int; it must be a function of the model"),
        ("my_own_module:returns_nothing", None, "has returned a NoneType; it must return a torch.optim.Optimizer"),
        ("my_own_module:knows", None, r"needs lr; it is called with the model and what it takes of lr \(by --lr"),
        ("my_own_module:fixed", 0.1, r"takes no lr; its keywords are \['rate'\]"),
        ("adam", None, "unknown here; choose from sgd, .*, or give module:function"),
    ],
)
def test_mistakes(mine: str, name: str, lr: float | None, message: str) -> None:
    config = Config(lr=() if lr is None else ((name, lr),))
    with pytest.raises(ValueError, match=message):
        build_optimizer(name, nn.Linear(2, 1), config, steps_per_epoch=1)


def test_mistakes_are_told_before_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("nowhere:make", "my.:make"):
        with pytest.raises(SystemExit) as stopped:
            main(["compare", "--optimizers", name, "--out", str(tmp_path), *SMALL])
        assert stopped.value.code == 2
    assert "nowhere:make cannot be imported" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


class Recorded(torch.optim.SGD):
    """Notes in which mode it stepped and which gradients had graphs."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.calls: list[str] = []

    def train(self) -> None:
        self.calls.append("train")

    def eval(self) -> None:
        self.calls.append("eval")

    def step(self, closure: Any = None) -> None:
        assert closure is None
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        self.calls.append("graph" if all(grad.grad_fn is not None for grad in grads) else "plain")
        super().step()


@pytest.mark.parametrize("create_graph", [False, True])
def test_modes_and_graphs(create_graph: bool) -> None:
    config, dataset = Config(model="mlp", epochs=1, batch_size=40), data.load("digits", train_size=80)
    runner = Runner("sgd", config, dataset, seed=0)
    runner.optimizer = Recorded(runner.model.parameters(), lr=0.1)
    runner.optimizer.create_graph = create_graph
    runner.scheduler = torch.optim.lr_scheduler.LambdaLR(runner.optimizer, lambda step: 1.0)
    for start in (0, 40):
        part = slice(start, start + 40)
        runner.step(dataset.train.images[part], dataset.train.labels[part])
    runner.end_epoch(dataset.test)
    kind = "graph" if create_graph else "plain"
    assert runner.optimizer.calls == ["train", kind, "train", kind, "eval"]
    assert all(p.grad is None for p in runner.model.parameters())


def test_sam_steps_by_the_gradient_beside(mine: str) -> None:
    """θ ← θ − lr·g(θ + ρ g/‖g‖), computed by hand."""
    optimizer_spec(f"{mine}:SAM")  # imports it
    sam, x, y = sys.modules[mine].SAM, torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    model = nn.Linear(3, 2)

    def grads() -> list[Tensor]:
        return list(torch.autograd.grad(F.cross_entropy(model(x), y), model.parameters()))

    start, first = [p.detach().clone() for p in model.parameters()], grads()
    length = torch.cat([g.flatten() for g in first]).norm()
    with torch.no_grad():
        for p, g in zip(model.parameters(), first, strict=True):
            p.add_(0.05 * g / length)
    expected = [p - 0.1 * g for p, g in zip(start, grads(), strict=True)]
    with torch.no_grad():
        for p, old in zip(model.parameters(), start, strict=True):
            p.copy_(old)
    before = F.cross_entropy(model(x), y).item()
    loss = optimizer_step(sam(model.parameters(), lr=0.1), lambda: F.cross_entropy(model(x), y))
    assert loss.item() == pytest.approx(before)
    for p, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), want)


def test_lbfgs_calls_its_closure_and_no_pass_comes_before() -> None:
    calls = 0
    weight = nn.Parameter(torch.tensor(3.0))

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        return (weight - 1).square()

    assert optimizer_step(torch.optim.LBFGS([weight], max_iter=1), loss) == 4
    assert calls == 1
    assert weight.grad is None


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3))


def muon_run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 1, 5, 5, generator=generator), torch.randint(3, (8,), generator=generator)
        optimizer_step(optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))  # type: ignore[misc]


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")


@needs_muon
def test_muon_is_torchs_on_matrices_and_adamw_on_the_rest() -> None:
    model, other = net(), net()
    muon_run(model, MuonAndAdamW(model, lr=0.01), range(5))
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.01}
    flat = nn.Parameter(other[0].weight.detach().flatten(1))  # the convolution as a matrix of its own
    muon = torch.optim.Muon([flat, other[3].weight], momentum=0.95, adjust_lr_fn="match_rms_adamw", **options)
    rest = [other[0].bias, other[3].bias, other[5].weight, other[5].bias]
    adamw = torch.optim.AdamW(rest, **options)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 1, 5, 5, generator=generator), torch.randint(3, (8,), generator=generator)
        other.zero_grad()
        F.cross_entropy(other(x), y).backward()
        flat.grad = other[0].weight.grad.flatten(1)
        muon.step()
        adamw.step()
        with torch.no_grad():
            other[0].weight.copy_(flat.view(4, 1, 3, 3))
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


@needs_muon
def test_muon_resumes_bit_for_bit_and_follows_a_schedule() -> None:
    model = net()
    optimizer = MuonAndAdamW(model, lr=0.01)
    muon_run(model, optimizer, range(3))
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    second = net()
    second.load_state_dict(weights)
    resumed = MuonAndAdamW(second, lr=0.5)
    resumed.load_state_dict(state)
    for each, opt in ((model, optimizer), (second, resumed)):
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5)
        assert {group["lr"] for group in opt.param_groups} == {0.005}
        muon_run(each, opt, range(3, 6))
        schedule.step()
    for p, q in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("name", "module"),
    [("soap", "pytorch_optimizer"), ("adahessian", "pytorch_optimizer"), ("schedule-free", "schedulefree")],
)
def test_rivals_of_the_extra_train_and_resume_or_say_what_is_missing(name: str, module: str, tmp_path: Path) -> None:
    config = Config(optimizers=(name,), model="mlp", epochs=2, seeds=(0,), batch_size=40, schedule="constant")
    try:
        __import__(module)
    except ImportError:
        with pytest.raises(ValueError, match=f"{name} needs {module}, which is not installed: pip install"):
            build_optimizer(name, nn.Linear(2, 1), config, steps_per_epoch=1)
        return
    dataset = data.load("digits", train_size=200)
    whole, part = Comparison(config), Comparison(config)
    assert whole.train(dataset)
    while not part.finished:
        torch.manual_seed(0)
        part.train(dataset, stop=lambda: True, save=lambda state: state.save(tmp_path / "checkpoint.pt"))
        part = Comparison.load(tmp_path / "checkpoint.pt")
    first, last = (whole.history[name][0][epoch]["train_loss"] for epoch in (0, 1))
    assert last < first
    if name != "adahessian":  # which draws random vectors from torch's global generator
        assert part.history[name][0][1]["train_loss"] == last
