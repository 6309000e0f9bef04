"""What people write around a step: accumulation, clipping, closures, hooks and copies of the model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from loops import METHODS, build_model, data, deviation, gradients, reference, same_parameters
from torch import Tensor
from torch.nn import functional as F

from fngd import NGD


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_adds_up_directions(set_to_none: bool) -> None:
    model = build_model().eval()
    parts = [data(8, 1), data(5, 2), data(8, 3)]
    build = lambda net: NGD(net, lr=0.1, alpha=1e-2)  # noqa: E731
    alone = [reference(model, build, *part) for part in parts]
    opt = build(model)
    for _ in range(2):  # a second time: zero_grad has cleared
        for x, y in parts:
            (F.cross_entropy(model(x), y) / 3).backward()
        expected = {name: sum(each[name] for each in alone) / 3 for name in alone[0]}
        assert deviation(gradients(model), expected) < 1e-5
        opt.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) == set_to_none for p in model.parameters())
        assert set_to_none or not any(p.grad.any() for p in model.parameters())


def test_clipping_acts_on_the_direction() -> None:
    model, (x, y) = build_model(), data()
    direction = reference(model, lambda net: NGD(net, lr=0.1), x, y)
    total = torch.cat([d.flatten() for d in direction.values()]).norm()
    opt = NGD(model, lr=1.0, momentum=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    F.cross_entropy(model(x), y).backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3).item() == pytest.approx(total.item(), rel=1e-5)
    opt.step()
    moved = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    assert deviation(moved, {name: d * 1e-3 / total for name, d in direction.items()}) < 1e-3


def test_closure_and_hooks() -> None:
    first, (x, y) = build_model(), data()
    second = copy.deepcopy(first)
    seen: list[str] = []
    opts = [METHODS["ngd"](net) for net in (first, second)]
    opts[0].register_step_pre_hook(lambda *_: seen.append("before"))
    opts[0].register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        opts[0].zero_grad()
        loss = F.cross_entropy(first(x), y)
        loss.backward()
        return loss

    for _ in range(4):
        returned = opts[0].step(closure)
        opts[1].zero_grad()
        loss = F.cross_entropy(second(x), y)
        loss.backward()
        opts[1].step()
        assert torch.equal(returned, loss)
    assert same_parameters(first, second)
    assert seen == ["before", "after"] * 4


def test_copies_of_the_model_train_on_their_own() -> None:
    model, (x, y) = build_model(), data()
    for method, build in METHODS.items():
        opt = build(model)
        if method == "fngd by sample":
            opt.next_batch(torch.arange(16))
        outputs = model(x)
        if method == "ngd true":
            opt.sample(outputs)
        F.cross_entropy(outputs, y).backward()
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [
            copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
        ]  # fmt: skip
        if method != "shampoo":  # it has no hooks
            opt.remove()
        truth = copy.deepcopy(model)
        for net in (truth, *copies):
            net.zero_grad()
            F.cross_entropy(net(x), y).backward()
        for net in copies:
            assert deviation(gradients(net), gradients(truth)) == 0
            NGD(net, lr=0.1).remove()
        average = torch.optim.swa_utils.AveragedModel(model)
        average.update_parameters(model)
        model.zero_grad()
