"""What KFAC does not precondition steps by the rule that the user gave, and is named."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from preconditioned import Net, batch, close, train
from torch import Tensor, nn
from torch.nn import functional as F

from fngd.kronecker.ekfac import EKFAC
from fngd.kronecker.eva import Eva
from fngd.kronecker.kfac import KFAC
from fngd.kronecker.mbf import MBF
from fngd.kronecker.skfac import SKFAC


@pytest.mark.usefixtures("double")
def test_other_parameters_take_the_users_rule() -> None:
    model, clean = Net(), Net()
    clean.load_state_dict(model.state_dict())
    opt = KFAC(model, lr=0.3, other="adamw", other_options={"lr": 0.01, "betas": (0.8, 0.99)})
    plain = {name: p for name, p in clean.named_parameters() if name.split(".")[0] in ("norm", "scale")}
    adamw = torch.optim.AdamW(plain.values(), lr=0.01, betas=(0.8, 0.99))
    rest = [p for name, p in clean.named_parameters() if name not in plain]
    kfac = KFAC(clean, rest, lr=0.3)
    assert [group["rule"] for group in opt.param_groups] == ["sgd", "adamw"]
    for number in range(3):
        x, y = batch(number)
        for net, optimizers in ((model, [opt]), (clean, [adamw, kfac])):
            F.cross_entropy(net(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
            net.zero_grad()
    for name, value in clean.state_dict().items():
        close(model.state_dict()[name], value, 1e-12)


@pytest.mark.usefixtures("double")
def test_group_can_do_without() -> None:
    model, clean = Net(), Net()
    clean.load_state_dict(model.state_dict())
    opt = KFAC(model, [{"params": model.parameters(), "precondition": False}], lr=0.1, weight_decay=0.01)
    sgd = torch.optim.SGD(clean.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    train(model, opt, range(3))
    train(clean, sgd, range(3))
    for name, value in clean.state_dict().items():
        close(model.state_dict()[name], value, 1e-12)
    assert all(reason.startswith("plain") for reason in opt.explain().values())


def test_bias_without_its_weight_in_another_group() -> None:
    """A bias that is not preconditioned, and a frozen one, are no columns of A."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)
    groups = [
        {"params": [model[0].weight, *model[1].parameters()]},
        {"params": [model[0].bias], "precondition": False},
    ]
    opt = KFAC(model, groups, lr=0.1)
    model(torch.randn(5, 3)).square().mean().backward()
    opt.step()
    assert opt._running["0"]["inputs"].shape[-1] == 3
    assert opt._running["1"]["inputs"].shape[-1] == 4


def test_explain_says_what_stays_plain() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    opt = KFAC(model)
    model(torch.tensor([1, 2])).mean().backward()
    with pytest.warns(UserWarning, match=r"44 % .*0.weight \[5, 4\] \(its weight is shared"):
        opt.step()
    assert opt.explain()["1"].startswith("preconditioned")
    assert opt.explain()["2"] == "plain: its weight is shared: 0.weight, 2.weight"
    opt.remove()
    up = nn.Sequential(nn.ConvTranspose1d(2, 2, 3), nn.Conv1d(2, 2, 3))
    opt = KFAC(up)
    up(torch.randn(2, 2, 5)).mean().backward()
    opt.step()
    assert "transposed" in opt.explain()["0"]
    assert list(opt._running) == ["1"]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("build", [KFAC, EKFAC, MBF, SKFAC, Eva])
def test_what_has_no_factors_takes_the_plain_gradient(build: Any) -> None:
    """Tied weights, a weight used without its layer, and a transposed convolution step as SGD does, and are named."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(2, 3, 3, stride=2, groups=1)
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.loose = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x).mean(2)
            return F.linear(self.second(self.first(y).tanh()), self.loose.weight)

    model = Mixed()
    sgd = copy.deepcopy(model)
    opts = [build(model, lr=0.1, functions=False), torch.optim.SGD(sgd.parameters(), lr=0.1, momentum=0.9)]
    for number in range(3):
        x = torch.randn(5, 2, 4)
        for net, opt in zip((model, sgd), opts, strict=True):
            opt.zero_grad()
            net(x).square().sum(1).mean().backward()
            told = net is model and not number
            with pytest.warns(UserWarning, match="preconditions nothing") if told else nullcontext():
                opt.step()
    for name, value in sgd.named_parameters():
        close(model.get_parameter(name), value, 1e-12)
    reasons = opts[0].explain()
    assert "transposed" in reasons["up"]
    assert reasons["first"] == "plain: its weight is shared: first.weight, second.weight"
    assert reasons["loose"].startswith("plain")
