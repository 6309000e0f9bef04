"""reweight: graphs that are differentiated again, in parts, or inside one another."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from passes import MODES, B, Branches, Mode, branch, each_asking, every_mode, gradients, same, squares, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("double")


@every_mode
def test_two_backward_passes_through_one_graph(mode: Mode) -> None:
    model, x = Branches(), torch.randn(B, 3)
    expected = mode.expected(model, branch(model, x, 0))
    with mode.on(model):
        loss = branch(model, x, 0).sum()
        loss.backward(retain_graph=True)
        same(gradients(model), expected)
        loss.backward()
    same(gradients(model), expected, expected)


@every_mode
def test_losses_with_shared_parts_one_after_the_other(mode: Mode) -> None:
    model, x = Branches(), torch.randn(B, 3)
    expected = [mode.expected(model, branch(model, x, place)) for place in range(3)]
    with mode.on(model):
        outputs = model(x)
        for place in range(3):
            squares(outputs[place]).sum().backward(retain_graph=place < 2)
            same(gradients(model), *expected[: place + 1])


@every_mode
def test_two_losses_at_once_and_two_forward_passes(mode: Mode) -> None:
    model, x, y = Branches(), torch.randn(B, 3), torch.randn(B, 3)
    outputs = model(x)
    together = mode.expected(model, squares(outputs[0]) + squares(outputs[1]))
    other = mode.expected(model, branch(model, y, 1))
    with mode.on(model):
        outputs = model(x)
        losses = [squares(outputs[0]).sum(), squares(outputs[1]).sum(), branch(model, y, 1).sum()]
        torch.autograd.backward(losses)
    same(gradients(model), together, other)


@every_mode
@pytest.mark.parametrize("chosen", ["trunk.weight", "trunk.bias", "left.weight", "left.bias", "weights", "biases", "x"])
@pytest.mark.parametrize("by_grad", [True, False], ids=["autograd.grad", "backward(inputs=)"])
def test_gradients_of_some_and_then_of_all(by_grad: bool, chosen: str, mode: Mode) -> None:
    model, x = Branches(), torch.randn(B, 3, requires_grad=True)
    expected = mode.expected(model, branch(model, x, 0))
    (of_x,) = torch.autograd.grad(branch(model, x, 0).sum(), x)
    used = {name: p for name, p in model.named_parameters() if name.split(".")[0] in ("trunk", "left")}
    some: dict[str, Tensor]
    if chosen == "x":
        some = {"x": x}
    elif chosen == "weights":
        some = {name: p for name, p in used.items() if name.endswith("weight")}
    elif chosen == "biases":
        some = {name: p for name, p in used.items() if name.endswith("bias")}
    else:
        some = {chosen: used[chosen]}
    with mode.on(model):
        loss = branch(model, x, 0).sum()
        if by_grad:
            found = torch.autograd.grad(loss, list(some.values()), retain_graph=True)
            got = dict(zip(some, found, strict=True))
            assert all(p.grad is None for p in (x, *model.parameters()))
        else:
            loss.backward(inputs=list(some.values()), retain_graph=True)
            got = {name: p.grad.clone() for name, p in some.items()}
            assert all(p.grad is None for p in model.parameters() if all(p is not each for each in some.values()))
        assert (chosen == "x") == (not mode.asked)
        same(got, {**expected, "x": of_x})
        model.zero_grad()
        x.grad = None
        loss.backward()
    same({**gradients(model), "x": x.grad}, {**expected, "x": of_x})


@each_asking
def test_create_graph(mode: Mode) -> None:
    """The gradients themselves are as always; to differentiate them is refused, not wrong."""
    model, x = Branches(), torch.randn(B, 3, requires_grad=True)
    expected = mode.expected(model, branch(model, x, 0))
    with mode.on(model):
        names = ["trunk.weight", "trunk.bias", "left.weight", "left.bias"]
        found = torch.autograd.grad(
            branch(model, x, 0).sum(), [model.get_parameter(name) for name in names], create_graph=True
        )
        same(dict(zip(names, found, strict=True)), expected)
        (slope,) = torch.autograd.grad(branch(model, x, 0).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            slope.square().sum().backward()


@each_asking
@pytest.mark.parametrize("output", ["curved", "linear"])
def test_second_derivatives_by_weights_are_refused(output: str, mode: Mode, request: pytest.FixtureRequest) -> None:
    """Though nothing that reaches a Tap or a Gate may have a gradient itself: z of a sum is ones."""
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(B, 3)
    with mode.on(model):
        out = model(x)
        loss = (out.sin() if output == "curved" else out).sum()
        (slope,) = torch.autograd.grad(loss, model[2].weight, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            (slope.square().sum() + loss).backward()


class BackwardInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).tanh()
        squares(self.head(h)).sum().backward()
        h = self.layer(h.detach()).tanh()
        squares(self.head(h)).sum().backward(retain_graph=True)
        return self.head(self.layer(h.detach()))


@every_mode
def test_backward_inside_of_forward(mode: Mode) -> None:
    model, x = BackwardInside(), torch.randn(B, 3)
    h = model.layer(x).tanh()
    again = model.layer(h.detach()).tanh()
    expected = [
        mode.expected(model, squares(output))
        for output in (model.head(h), model.head(again), model.head(model.layer(again.detach())))
    ]
    with mode.on(model):
        for _ in range(2):
            same(step(model, lambda: squares(model(x))), *expected)


class Reentrant(nn.Module):
    """A checkpoint that uses a layer which is used outside of it, too."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = nn.Linear(3, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).tanh()
        h = checkpoint(lambda h: self.layer(self.layer(h).relu_()), h, use_reentrant=self.reentrant)
        return self.layer(h)


@pytest.mark.parametrize("reentrant", [False, True])
@each_asking
def test_a_layer_inside_and_outside_of_a_checkpoint(mode: Mode, reentrant: bool) -> None:
    model, x = Reentrant(reentrant), torch.randn(B, 3, requires_grad=True)
    expected = mode.expected(model, squares(model(x))) if not reentrant else None
    if expected is None:
        expected = mode.expected(model, squares(_plain_reentrant(model, x)))
    with mode.on(model):
        for _ in range(3):
            same(step(model, lambda: squares(model(x))), expected)


def _plain_reentrant(model: Reentrant, x: Tensor) -> Tensor:
    h = model.layer(x).tanh()
    return model.layer(model.layer(model.layer(h).relu()))


@pytest.mark.parametrize("gram", [False, True])
def test_a_checkpoint_around_the_whole_model(gram: bool) -> None:
    for mode in (mode for mode in MODES if mode.gram == gram):
        model, x = Branches(), torch.randn(B, 3, requires_grad=True)
        expected = mode.expected(model, branch(model, x, 0))
        with mode.on(model):
            for reentrant in (False, True):
                run = partial(checkpoint, model, x, use_reentrant=reentrant)
                same(step(model, lambda run=run: squares(run()[0])), expected)
