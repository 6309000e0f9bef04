"""States that are none: one sentence, and nothing loaded; whatever is loaded can make a step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from loops import METHODS, build_model, data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fngd import GaussNewton

RUBBISH = {
    "None": None, "text": "x", "list": [1], "dict": {"a": 1}, "negative": -7, "float": 0.5, "tensor": torch.zeros(3, 2),
    "long": torch.zeros(2, dtype=torch.long), "missing": ...,
}  # fmt: skip


class Least:
    """GaussNewton behind the loop of the others."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.opt = model, GaussNewton(model, momentum=0.5, damping=1e-3)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.opt, name)


def build(name: str) -> tuple[nn.Module, Any]:
    if name == "gauss-newton":
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
        return model, Least(model)
    model = build_model()
    return model, METHODS[name](model)


def turn(model: nn.Module, opt: Any, number: int) -> None:
    if isinstance(opt, Least):
        x = torch.linspace(0, 1, 15, dtype=torch.float64).view(5, 3) + number
        opt.step(lambda: (model(x) - x.sin()[:, :1]).squeeze(1))
        return
    x, y = data(8, number)
    if getattr(opt, "_table", None) is not None and opt._table.share == "sample":
        opt.next_batch(torch.arange(8) + 4 * (number % 2))
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    if getattr(opt, "measuring", False):
        opt.adapt(loss, F.cross_entropy(model(x), y))
    opt.zero_grad()


def paths(value: Any, depth: int = 4) -> Iterator[tuple[Any, ...]]:
    """Every place in a state, as keys to follow."""
    if depth and isinstance(value, dict | list) and len(value):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (key,)
            yield from ((key, *rest) for rest in paths(value[key], depth - 1))


def replaced(state: Any, path: tuple[Any, ...], rubbish: Any) -> Any:
    copied = copy.deepcopy(state)
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    if rubbish is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = copy.deepcopy(rubbish)
    return copied


def same(state: Any, before: Any) -> None:
    """Bit for bit; a factor of a sample that was never met is NaN."""
    numbers, others = ([leaf for leaf in tree_leaves(each) if isinstance(leaf, Tensor)] for each in (state, before))
    torch.testing.assert_close(numbers, others, rtol=0, atol=0, equal_nan=True)
    texts, others = ([leaf for leaf in tree_leaves(each) if not isinstance(leaf, Tensor)] for each in (state, before))
    assert texts == others


def harm(name: str, state: Any, path: tuple[Any, ...], rubbish: Any) -> str | None:
    """What is wrong with how an optimiser takes a state with rubbish in one place; None where nothing is."""
    model, opt = build(name)
    turn(model, opt, 5)
    before = copy.deepcopy(opt.state_dict())
    try:
        opt.load_state_dict(replaced(state, path, rubbish))
    except ValueError as error:
        if "\n" in str(error):
            return f"not one sentence: {error}"
        same(opt.state_dict(), before)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    try:
        for number in range(6, 9):
            turn(model, opt, number)
    except Exception as error:
        return f"a step after loading: {type(error).__name__}: {error}"
    return None


NAMES = ("ngd", "ngd adaptive", "fngd", "fngd by sample", "kfac", "skfac", "eva", "shampoo", "gauss-newton")


@pytest.mark.parametrize("share", [29, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_rubbish_is_refused_whole_or_does_no_harm(name: str, share: int) -> None:
    model, opt = build(name)
    for number in range(3):
        turn(model, opt, number)
    state = opt.state_dict()
    places = [(path, kind) for path in paths(state) for kind in RUBBISH]
    found = {place: harm(name, state, place[0], RUBBISH[place[1]]) for place in places[::share]}
    assert not (bad := {place: words for place, words in found.items() if words is not None}), bad
