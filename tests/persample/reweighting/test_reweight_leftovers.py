"""reweight: nothing is left behind, and threads do not meet."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracle import loop_grads_of
from passes import (
    CELLS,
    FACTORS,
    MODES,
    B,
    Function,
    Loop,
    Mode,
    Stop,
    each_asking,
    every_mode,
    groups_of,
    modules_of,
    same,
    squares,
    step,
    stop,
)
from torch import Tensor, nn
from torch.nn import functional as F

from persample.reweighting import reweight

pytestmark = pytest.mark.usefixtures("double")


class Scaled(nn.Module):
    """A function's biases that are computed anew in each pass, two of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.first, self.second = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.weight, self.first * self.second)
        return F.linear(h.tanh(), self.weight, self.second.exp())


@each_asking
def test_computed_biases_are_no_new_layers_in_each_pass(mode: Mode) -> None:
    model, x = Scaled(), torch.randn(B, 3)
    expected = mode.expected(model, squares(model(x)), {"all": ["weight", "first", "second"]})
    with mode.on(model, functions=True) as handle:
        for _ in range(4):
            same(step(model, lambda: squares(model(x))), expected)
            assert sorted(path for paths in mode.asked for path in paths) == ["weight", "weight (2)"]
            assert list(handle.explain()) == ["weight", "weight (2)"]
            mode.asked.clear()


@pytest.fixture
def _no_collection() -> Any:
    gc.disable()
    yield
    gc.enable()


class Held:
    """A tensor that a graph holds for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def watched_loss(model: nn.Module, x: Tensor) -> tuple[Tensor, list[weakref.ref]]:
    """The loss, and what its graph holds."""
    held: list[weakref.ref] = []

    def pack(tensor: Tensor) -> Held:
        kept = Held(tensor.detach())  # an output with its graph would be a cycle
        held.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        return squares(model(x, 2)).sum(), held


@every_mode
@pytest.mark.parametrize("end", ["dropped", "backward", "grad of x", "hook raises", "policy raises"])
@pytest.mark.usefixtures("_no_collection")
def test_no_reference_cycle_keeps_activations(end: str, mode: Mode) -> None:
    model, x = Loop(nn.Sequential(nn.Linear(6, 6), nn.Tanh())), torch.randn(B, 6, requires_grad=True)
    raising = [False]

    def policy(*args: Any) -> Any:
        if raising[0]:
            raise Stop
        return mode.policy(*args)

    with reweight(model, policy, joint=mode.joint, outputs=True):
        step(model, lambda: squares(model(x, 2)))
        loss, held = watched_loss(model, x)
        assert all(ref() is not None for ref in held)
        assert len(held) > 6
        raising[0] = end == "policy raises"
        if end == "backward":
            loss.backward()
        elif end == "grad of x":
            torch.autograd.grad(loss, x)
        elif end == "policy raises":
            try:
                loss.backward()
            except Stop as error:
                error.__traceback__ = None
        elif end == "hook raises":
            x.register_hook(stop)
            try:
                loss.backward(retain_graph=True)
            except Stop as error:
                error.__traceback__ = None
        del loss
        assert [ref for ref in held if ref() is not None] == []


@each_asking
def test_nothing_grows_over_many_steps(mode: Mode) -> None:
    """Neither tensors nor other objects, whichever number of times layers are called."""
    model, x = Loop(Function()), torch.randn(B, 6)
    counts: list[tuple[int, int]] = []
    with mode.on(model, functions=True) as handle:
        for number in range(63):
            step(model, lambda n=number: squares(model(x, n % 3)))
            mode.asked.clear()
            if number % 21 == 20:
                gc.collect()
                objects = gc.get_objects()
                counts.append((len(objects), sum(type(each) is Tensor for each in objects)))
                del objects
        assert len(handle.explain()) == 3
    assert counts[2][1] == counts[1][1]
    assert abs(counts[2][0] - counts[1][0]) <= 20


def test_two_models_in_two_threads() -> None:
    """They come out as one after the other, whatever the kind of pass."""
    modes, errors = MODES, []
    models = [Loop(build()) for build, _ in list(CELLS.values())[:4]]
    xs = [torch.randn(B, 5, 6) for _ in models]
    groups = [groups_of(model, functions) for model, (_, functions) in zip(models, CELLS.values(), strict=False)]
    expected = [
        mode.expected(model, squares(model(x, 2)), group)
        for mode, model, x, group in zip(modes, models, xs, groups, strict=True)
    ]

    def run(place: int) -> None:
        torch.set_num_threads(1)
        try:
            mode = Mode(modes[place].joint, modes[place].gram)
            with mode.on(models[place], functions=True):
                for _ in range(10):
                    got = step(models[place], lambda: squares(models[place](xs[place], 2)))
                    same(got, expected[place])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@each_asking
def test_complex_weights_stay_plain(mode: Mode) -> None:
    model, x = Loop(nn.Linear(6, 6), nn.Linear(6, 2, dtype=torch.complex128)), torch.randn(B, 6)
    model.head.register_forward_pre_hook(lambda module, args: args[0].to(torch.complex128))

    def losses() -> Tensor:
        return model(x).abs().square().sum(1)

    groups = {path: names for path, names in modules_of(model).items() if path != "head"}
    expected = mode.expected(model, losses(), groups)
    with mode.on(model) as handle:
        same(step(model, losses), expected)
        assert handle.explain()["head"] == "plain: its weight is complex"


def chain(sizes: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(sizes)))


@each_asking
def test_other_leaves_by_functional_call(mode: Mode) -> None:
    """They are reweighted, and nothing is left behind."""
    model, x = chain((3, 4, 2)), torch.randn(B, 3)
    values = {name: (2 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    losses = squares(torch.func.functional_call(model, values, (x,)))
    rows = loop_grads_of(losses, values)
    with mode.on(model):
        squares(torch.func.functional_call(model, values, (x,))).sum().backward()
        same({n: v.grad for n, v in values.items()}, {n: torch.tensordot(FACTORS, row, 1) for n, row in rows.items()})
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
