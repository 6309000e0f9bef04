"""States of optimisers and what torch does with them: hooks, distributed checkpoints, groups that are empty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops import METHODS, build_model, data, same_leaves
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn import functional as F

from fngd import FNGD, KFAC, NGD, AdaptiveDamping

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


def words(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(12).view(4, 3) % 5).mean(1).square().mean()


def test_sparse_gradients_of_a_batch_that_is_skipped() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    opt = FNGD(model, lr=0.1, momentum=0.0, steps_per_epoch=2)
    words(model).backward()
    with pytest.warns(UserWarning, match="counts as a batch that was skipped"):
        opt.zero_grad()


def test_sparse_gradients_want_a_group_with_the_rule_of_sgd() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.LayerNorm(4), nn.Linear(4, 2))
    rest = [param for layer in model[1:] for param in layer.parameters()]
    opt = NGD(model, lr=0.1, momentum=0.0, other="adamw")
    words(model).backward()
    with pytest.raises(ValueError, match=r"shape \[\(5, 4\)\] have sparse gradients.*rule='sgd'"):
        opt.step()
    opt.remove()
    groups = [{"params": model[0].parameters(), "rule": "sgd"}, {"params": rest}]
    opt = NGD(model, groups, lr=0.1, momentum=0.0, other="adamw")
    kept = [(group["rule"], len(group["params"])) for group in opt.param_groups]
    assert kept == [("sgd", 1), ("sgd", 2), ("adamw", 2)]
    before, table = model[0].weight.detach().clone(), model[0].weight
    with pytest.warns(UserWarning, match="preconditions nothing"):  # its layers were called before it was there
        opt.step()
    assert table.grad is not None
    torch.testing.assert_close(table, before - 0.1 * table.grad.to_dense())


def test_a_damping_that_starts_anew_is_told() -> None:
    model = nn.Linear(3, 2)
    opt = NGD(model, lr=0.1, adapt_damping=AdaptiveDamping())
    state = opt.state_dict()
    opt.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"no 'adaptive'.*starts anew"):
        opt.load_state_dict({key: state[key] for key in ("state", "param_groups")})
