"""What stays plain around attention and functions is stepped as SGD would, and named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from attending import PLAIN, gradients, losses_of, moved, natural, plain_gradient, problem, step
from preconditioned import close
from torch import Tensor, nn
from torch.nn import functional as F

from fngd import EKFAC, FNGD, KFAC, MBF, NGD, SKFAC, AdaptiveDamping, Eva
from fngd.optim.layers import members

pytestmark = pytest.mark.usefixtures("double")


class Rows(nn.Module):
    """Rows of a parameter, multiplied by the model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.weight = nn.Linear(3, 4), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inp(x).tanh()
        return (y[:, None] * self.weight[:3]).sum(2).sin() + (y[:, None] * self.weight[3:]).sum((1, 2))[:, None]


@pytest.mark.parametrize("build", [NGD, KFAC, EKFAC, MBF, SKFAC, Eva])
def test_rows_that_a_model_takes_itself_stay_plain_and_are_named(build: Any) -> None:
    torch.manual_seed(0)
    model, x = Rows(), torch.randn(6, 3)
    (g,) = torch.autograd.grad(losses_of(model(x)).mean(), model.weight)
    opt = build(model, lr=1.0, **PLAIN)
    with pytest.warns(UserWarning, match="preconditions 38 %"):
        close(moved(model, opt, x)["weight"], g, 1e-12)
    assert opt.explain()["weight"].startswith("plain: it was given to 'mul', and not as the weight")


@pytest.mark.parametrize("build", [NGD, KFAC, EKFAC, MBF, SKFAC, Eva])
def test_groups_frozen_parts_and_functions_false(build: Any) -> None:
    model, x = problem("cross")
    g = plain_gradient(model, x)
    attention = list(model.attn.parameters())
    others = [each for each in model.parameters() if all(each is not own for own in attention)]
    start = copy.deepcopy(model.state_dict())
    for options, groups in (
        ({}, [{"params": others}, {"params": attention, "precondition": False}]),
        ({"functions": False}, None),
    ):
        opt = build(model, groups, lr=1.0, **options, **PLAIN)
        change = moved(model, opt, x)
        why = opt.explain()
        opt.remove()
        model.load_state_dict(start)
        for name in ("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"):
            close(change[name], g[name], 1e-12)
        assert ((change["weight"] - g["weight"]).norm() > 1e-3) == (not options)
        assert all(reason.startswith("plain: ") for path, reason in why.items() if "attn" in path)
        assert len([path for path in why if "attn" in path]) >= 2
    model.attn.in_proj_bias.requires_grad_(False)
    model.attn.out_proj.weight.requires_grad_(False)
    opt = build(model, lr=1.0, **PLAIN)
    assert opt.explain()["attn.in_proj_weight"] == "plain so far: its function has not been called"
    change = moved(model, opt, x)
    assert opt.explain()["attn.out_proj"] == "plain: its weight is frozen"
    assert not change["attn.in_proj_bias"].any()
    assert not change["attn.out_proj.weight"].any()
    close(change["attn.out_proj.bias"], g["attn.out_proj.bias"], 1e-12)
    assert (change["attn.in_proj_weight"] - g["attn.in_proj_weight"]).norm() > 1e-3


def test_adamw_for_what_is_not_known_to_be_linear() -> None:
    model, x = problem("cross")
    opt = NGD(model, lr=0.1, other="adamw")
    rules = {id(param): group["rule"] for group in opt.param_groups for param in group["params"]}
    named = {name: rules[id(param)] for name, param in model.named_parameters()}
    assert {name for name, rule in named.items() if rule == "adamw"} == {"weight", "bias", "scale"}
    step(model, opt, x)
    assert opt.explain()["weight"] == "plain: its weight is in a group with precondition=False"
    assert opt.explain()["attn.in_proj_weight[0:4]"].startswith("reweighted")


class Shared(nn.Module):
    """A layer's weight is a function's, too; an embedding's is an output layer's; a bias is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.single = nn.Embedding(6, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.weight, self.offset = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.linear(self.layer(self.table(ids)).tanh(), self.layer.weight).tanh()
        x = F.linear(self.single(x), self.weight, 2 * self.offset)
        return F.linear(x, self.table.weight)


@pytest.mark.parametrize("build", [KFAC, EKFAC, MBF, SKFAC, Eva])
def test_shared_weights_are_plain_and_named(build: Any) -> None:
    torch.manual_seed(0)
    model, ids = Shared(), torch.randint(6, (5,))
    losses_of(model(ids)).mean().backward()
    g = gradients(model)
    opt = build(model, lr=1.0, **PLAIN)
    with pytest.warns(UserWarning, match="preconditions 20 %"):
        change = moved(model, opt, ids)
    for name, value in g.items():
        assert ("single" in name) == ((change[name] - value).norm() > 1e-3), name
    why = opt.explain()
    assert why["layer"] == why["layer.weight"] == "plain: its weight is used by several layers: 'layer', 'layer.weight'"
    assert why["table.weight"] == "plain: its weight is an embedding's, too"
    assert why["weight"] == "plain: its bias is no parameter, nor rows of one"
    assert why["single"].startswith("preconditioned")


@pytest.mark.parametrize("build", [KFAC, EKFAC, MBF, SKFAC, Eva])
def test_a_layer_that_is_called_only_later(build: Any) -> None:
    """Its weight was a function's; from then on both are plain."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.late = nn.Linear(3, 3), False

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(x, self.layer.weight, self.layer.bias).tanh()
            return self.layer(x) if self.late else x

    torch.manual_seed(0)
    model, x = Late(), torch.randn(5, 3)
    opt = build(model, lr=1.0, **PLAIN)
    step(model, opt, x)
    assert opt.explain()["layer.weight"].startswith("preconditioned")
    model.late = True
    change = moved(model, opt, x)
    close(change["layer.weight"], model.layer.weight.grad, 1e-12)
    close(change["layer.bias"], model.layer.bias.grad, 1e-12)
    assert "several layers: 'layer', 'layer.weight'" in opt.explain()["layer"]


def test_a_function_that_comes_late_leaves_the_network_its_coefficients() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
            self.weight, self.late = nn.Parameter(torch.randn(4, 4)), False

        def forward(self, x: Tensor) -> Tensor:
            y = self.inp(x).tanh()
            return self.head(F.linear(y, self.weight).tanh() if self.late else y)

    torch.manual_seed(0)
    model, x = Late(), torch.randn(5, 3)
    opt = FNGD(model, lr=0.0, alpha=1e-2, steps_per_epoch=2, gram="network", **PLAIN)
    seen = []
    for number in range(4):
        model.late = number % 2 == 1  # the second batch of each epoch: once as a function that is new, once stored
        step(model, opt, x)
        seen.append(gradients(model))
    for name in ("inp.weight", "head.weight", "head.bias"):
        close(seen[3][name], seen[1][name], 1e-12)
        close(seen[2][name], seen[0][name], 1e-12)
    model.zero_grad()
    opt.remove()
    losses = losses_of(model(x))
    own = [p for name, p in model.named_parameters() if name != "weight"]
    rows = [torch.autograd.grad(loss, own, retain_graph=True) for loss in losses]
    u = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows], 1)
    got = torch.cat([seen[1][name].flatten() for name, _ in model.named_parameters() if name != "weight"])
    close(got, natural(u, u.mean(1), 1e-2, "absorb"))


def test_shared_weights_have_a_block_for_each_use() -> None:
    torch.manual_seed(0)
    model, ids = Shared(), torch.randint(6, (5,))
    losses_of(model(ids)).mean().backward()
    g = gradients(model)
    opt = NGD(model, lr=1.0, **PLAIN)
    step(model, opt, ids)
    why = opt.explain()
    assert {path for path, reason in why.items() if reason.startswith("reweighted")} == {
        "layer", "layer.weight", "single", "table.weight"
    }  # fmt: skip
    assert why["weight"] == "plain: its bias is no parameter, nor rows of one"
    close(model.weight.grad, g["weight"], 1e-12)
    opt.remove()
    opt = NGD(model, adapt_damping=AdaptiveDamping())
    with pytest.raises(ValueError, match=r"cannot predict the step of 'table.weight': its weight is an embedding's"):
        step(model, opt, ids)


def test_members_of_what_is_no_layer() -> None:
    model, _ = problem("self")
    opt = NGD(model)
    assert members(opt._handle, "nothing") == (None, None)
    entry = {"inputs": torch.eye(2), "outputs": torch.eye(2), "count": torch.ones(())}
    with pytest.raises(ValueError, match="factors of layers"):
        state = KFAC(copy.deepcopy(model)).state_dict()
        state["preconditioner"]["running"]["attn.wrong_weight[0:2]"] = entry
        KFAC(copy.deepcopy(model)).load_state_dict(state)
