"""A model without chance: every draw is replaced by a number that does not depend on how many are drawn.

Two runs of a model with dropout have other losses because they draw other numbers. Whether they would be the same
otherwise shows where nothing is drawn: a uniform number is one half, a normal one its mean, and dropout keeps
everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Drawn(RuntimeError):
    """An operation has drawn numbers for which there is nothing to put (a permutation, say)."""


class Still(TorchDispatchMode):
    """Random operations run, and then their result is overwritten; those that cannot be are an error, `Drawn`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        known = _STILL.get(func._schema.name)
        before = random_state() if known is None else []
        result = func(*args, **kwargs)
        if known is not None:
            known(result, {**dict(zip((each.name for each in func._schema.arguments), args, strict=False)), **kwargs})
        elif not all(map(torch.equal, before, random_state())):
            raise Drawn(f"{func._schema.name} draws random numbers that cannot be replaced")
        return result


def random_state() -> list[Tensor]:
    """States of the generators that a model draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


Given = dict[str, Any]


def _dropout(result: tuple[Tensor, Tensor], given: Given) -> None:
    result[0].copy_(given["input"])
    result[1].fill_(1)


def _bernoulli(result: Tensor, given: Given) -> None:
    """The probability itself: without `p`, what the tensor holds."""
    p: Any = given.get("p", given["self"])
    result.copy_(p) if isinstance(p, Tensor) else result.fill_(p)


def _bernoulli_in_place(result: Tensor, given: Given) -> None:
    """Without `p`, one half: what the tensor held makes no difference."""
    _bernoulli(result, {"p": 0.5, **given})


def _half(result: Tensor, given: Given) -> None:
    result.fill_((given.get("from", 0.0) + given.get("to", 1.0)) / 2)


def _mean(result: Tensor, given: Given) -> None:
    mean = given.get("mean", 0.0)
    result.copy_(mean.expand_as(result)) if isinstance(mean, Tensor) else result.fill_(mean)


def _lowest(result: Tensor, given: Given) -> None:
    low: Any = given.get("low", given.get("from") or 0)
    result.fill_(low)


def _one(result: Tensor, given: Given) -> None:
    result.fill_(1)


_STILL: dict[str, Callable[[Any, Given], None]] = {
    "aten::native_dropout": _dropout,
    **dict.fromkeys(("aten::rand", "aten::rand_like", "aten::uniform_"), _half),
    **dict.fromkeys(("aten::randn", "aten::randn_like", "aten::normal_", "aten::normal"), _mean),
    **dict.fromkeys(("aten::randint", "aten::randint_like", "aten::random_"), _lowest),
    "aten::bernoulli": _bernoulli,
    "aten::bernoulli_": _bernoulli_in_place,
    "aten::exponential_": _one,
}
"""What is put in the place of a result, by operation."""
