"""What surrounds the directions of NGD and FNGD: every scheduler, foreach, signatures, and misuse that is noticed."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from natural import Small, data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from fngd import FNGD, NGD
from fngd.natural.options import Options
from fngd.optim.guards import reduction_of

pytestmark = pytest.mark.usefixtures("double")

SCHEDULERS: dict[str, dict[str, Any]] = {
    "LambdaLR": {"lr_lambda": lambda step: 0.9**step},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ConstantLR": {"total_iters": 2},
    "LinearLR": {"total_iters": 3},
    "ExponentialLR": {"gamma": 0.8},
    "PolynomialLR": {"total_iters": 4},
    "CosineAnnealingLR": {"T_max": 4},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 6},
    "ReduceLROnPlateau": {"patience": 0},
    "SequentialLR": {},
    "ChainedScheduler": {},
}


def scheduler_of(name: str, opt: torch.optim.Optimizer) -> Any:
    pair = [lr_scheduler.ConstantLR(opt, 0.5, 2), lr_scheduler.ExponentialLR(opt, 0.9)]
    if name == "SequentialLR":
        return lr_scheduler.SequentialLR(opt, pair, milestones=[2])
    if name == "ChainedScheduler":
        return lr_scheduler.ChainedScheduler(pair, optimizer=opt)
    opt = scheduler_free(opt)
    return getattr(lr_scheduler, name)(opt, **SCHEDULERS[name])


def scheduler_free(opt: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Undoes what constructing the pair did to the rates."""
    for group in opt.param_groups:
        group["lr"] = group.pop("initial_lr")
    return opt


def test_no_scheduler_is_forgotten() -> None:
    exported = {name for name in lr_scheduler.__all__ if name not in ("LRScheduler", "LambdaLR")} | {"LambdaLR"}
    assert exported == set(SCHEDULERS)


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # SequentialLR's own call, in torch 2.8
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", [NGD, FNGD])
def test_every_scheduler_runs_as_with_sgd(kind: Any, name: str) -> None:
    """Heavy damping is SGD: the same scheduler on both, momentum cycled too, gives the same parameters."""
    plain = Small()
    model, (x, y) = copy.deepcopy(plain), data(5)
    opt = kind(model, lr=0.05, alpha=float("inf"), **({"steps_per_epoch": 1} if kind is FNGD else {}))
    sgd = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    schedules = [scheduler_of(name, each) for each in (opt, sgd)]
    for _ in range(5):
        for net, stepper, schedule in ((model, opt, schedules[0]), (plain, sgd, schedules[1])):
            stepper.zero_grad()
            F.cross_entropy(net(x), y).backward()
            stepper.step()
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"other": "adamw"}, {"nesterov": True, "weight_decay": 0.1}])
def test_foreach_changes_nothing(options: dict[str, Any]) -> None:
    start, (x, y) = Small(), data(5)
    results = []
    for foreach in (False, True):
        model = copy.deepcopy(start)
        opt = NGD(model, lr=0.1, foreach=foreach, **options)
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        results.append(list(model.parameters()))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_copies_of_the_model_carry_no_optimiser() -> None:
    model, (x, y) = Small(), data(4)
    NGD(model, lr=0.1, fisher="true", accumulate="joint")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        F.cross_entropy(other(x), y).backward()  # asks for no samples
        opt = NGD(other, lr=0.1)
        opt.remove()


def test_signatures_show_every_option() -> None:
    ngd, fngd = (inspect.signature(kind).parameters for kind in (NGD, FNGD))
    own = {"history", "curvature_samples", "curvature_every"}  # FNGD's coefficients are of one batch
    assert set(ngd) - own <= set(fngd)
    assert not own & set(fngd)
    assert all(fngd[name].default == ngd[name].default for name in ngd if name not in own)
    keywords = {name for name, p in ngd.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keywords - {"seed"} - own == set(Options.__annotations__)
    with pytest.raises(TypeError, match="FNGD has no option 'x'"):
        FNGD(Small(), steps_per_epoch=1, x=1)


def changed_head(model: Small) -> None:
    model.head = nn.Linear(4, 3, bias=False)


def changed_weight(model: Small) -> None:
    model.head.weight = nn.Parameter(torch.zeros(3, 4))


def added(model: Small) -> None:
    model.extra = nn.Linear(2, 2)


def added_in_a_layer(model: Small) -> None:
    model.inner.extra = nn.Linear(2, 2, bias=False)


def removed(model: Small) -> None:
    model.inner.bias = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_head, r"parameters \['head.weight'\] replaced"),
        (changed_weight, r"parameters \['head.weight'\] replaced"),
        (added, r"parameters \['extra.bias', 'extra.weight'\] added"),
        (added_in_a_layer, r"parameters \['inner.extra.weight'\] added"),
        (removed, r"parameters \['inner.bias'\] removed.*construct a new one"),
    ],
)
def test_a_model_that_was_changed(change: Any, message: str) -> None:
    model, (x, y) = Small(), data(4)
    opt = NGD(model, lr=0.1)
    opt.step()  # looked at in every step, not in the first alone
    model.inner.note = nn.Identity()  # no parameter
    opt.step()
    change(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=message):
        opt.step()


def test_parameters_that_were_added_to_the_optimiser_too() -> None:
    model, (x, y) = Small(), data(4)
    opt = NGD(model, lr=0.1)
    added(model)
    opt.add_param_group({"params": model.extra.parameters()})
    F.cross_entropy(model(x), y).backward()
    opt.step()


def test_a_loss_that_is_reduced_in_another_way() -> None:
    model, (x, y) = Small(), data(4)
    opt = NGD(model, lr=0.1, scale="per_layer")

    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y, reduction="sum")
        loss.backward()
        return loss

    with pytest.raises(ValueError, match=r"the training loss is a sum .* reduction='mean'\. Give it reduction='sum'"):
        opt.step(closure)
    opt.remove()
    opt = NGD(model, lr=0.1)  # where it makes no difference, it is no error
    opt.step(closure)
    with pytest.raises(ValueError, match="is a sum over the batch"):
        opt.check_loss(model(x).square().sum())
    opt.check_loss(F.cross_entropy(model(x), y))


def test_reductions_that_a_graph_tells() -> None:
    x, y = torch.randn(4, 3, requires_grad=True), torch.randint(3, (4,))
    assert reduction_of(F.cross_entropy(x, y)) == "mean"
    assert reduction_of(F.cross_entropy(x, y, reduction="sum")) == "sum"
    assert reduction_of(F.mse_loss(x, torch.zeros(4, 3), reduction="sum")) == "sum"
    assert reduction_of(x.square().sum(1).mean()) == "mean"
    assert reduction_of(x.square().sum() / 4) is None
    assert reduction_of(torch.zeros(())) is None
