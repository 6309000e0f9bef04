"""States of optimisers and what torch does with them: hooks, distributed checkpoints, groups that are empty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops import METHODS, build_model, data, same_leaves
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn import functional as F

from fngd import FNGD, KFAC, NGD

OWN = {"fngd": "coefficients", "ngd adaptive": "adaptive", "kfac": "preconditioner", "shampoo": "preconditioner"}


def steps(model: nn.Module, opt: Any, count: int) -> None:
    for number in range(count):
        x, y = data(8, number)
        before = F.cross_entropy(model(x), y)
        before.backward()
        opt.step()
        if getattr(opt, "measuring", False):
            opt.adapt(before, F.cross_entropy(model(x), y))
        opt.zero_grad()


@pytest.mark.parametrize("name", OWN)
def test_hooks_see_all_of_a_state(name: str) -> None:
    model = build_model()
    opt = METHODS[name](model)
    steps(model, opt, 2)
    seen = []
    opt.register_state_dict_post_hook(lambda _, state: seen.append(set(state)), prepend=True)
    opt.register_load_state_dict_pre_hook(lambda _, state: seen.append(set(state)))
    state = opt.state_dict()
    opt.load_state_dict(state)
    assert seen == [{"state", "param_groups", OWN[name]}] * 2
    assert set(state) == seen[0]


@pytest.mark.parametrize("name", OWN)
def test_hooks_may_change_what_is_loaded_and_see_it_loaded(name: str) -> None:
    model, other = build_model(), build_model()
    opt, resumed = METHODS[name](model), METHODS[name](other)
    steps(model, opt, 2)
    found = []
    resumed.register_load_state_dict_pre_hook(lambda _, state: state["inside"])
    resumed.register_load_state_dict_post_hook(lambda loaded: found.append(loaded.state_dict()))
    resumed.load_state_dict({"inside": opt.state_dict()})
    same_leaves(found[0], opt.state_dict())


@pytest.mark.parametrize("name", [*OWN, "eva"])
def test_the_step_by_which_torch_makes_a_state_is_no_batch(name: str) -> None:
    runs = []
    for asked in (False, True):
        model = build_model()
        opt = METHODS[name](model)
        if asked:
            get_optimizer_state_dict(model, opt)  # makes a step with rates and gradients of zero
        steps(model, opt, 7)
        runs.append(list(opt.param_groups[0]["params"]))
    same_leaves(*runs)


def test_a_first_step_with_a_rate_of_zero_is_a_batch() -> None:
    model = build_model()
    opt = FNGD(model, lr=0.0, steps_per_epoch=1)
    steps(model, opt, 1)
    assert not opt.computing


@pytest.mark.parametrize("build", [FNGD, KFAC])
def test_an_empty_first_group(build: Any) -> None:
    model = nn.Linear(3, 2)
    options = {"steps_per_epoch": 1} if build is FNGD else {}
    opt = build(model, [{"params": []}, {"params": model.parameters()}], lr=0.1, **options)
    F.cross_entropy(model(torch.randn(4, 3)), torch.tensor([0, 1, 0, 1])).backward()
    opt.step()
    opt.load_state_dict(opt.state_dict())


def test_a_state_from_before_the_first_labels_were_drawn() -> None:
    model = nn.Linear(3, 2)
    opt = NGD(model, lr=0.1, fisher="true")
    state, drawn = opt.state_dict(), []
    for _ in range(2):
        opt.sample(model(torch.randn(4, 3)), lambda outputs: -outputs.log_softmax(1)[:, 0])
        drawn.append(opt.state_dict()["sampling"])
        opt.sample(model(torch.randn(4, 3)))
        opt.load_state_dict(state)
        assert "sampling" not in opt.state_dict()
    assert torch.equal(*drawn)
