"""The checker of annotations that all tests run under sees what is wrong: types, shapes, one size for each axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from shapes import checked
from torch import Tensor

import fngd
import persample

Matrix = Float[Tensor, "rows columns"]
Maybe = Matrix | None


@checked
def product(a: Float[Tensor, "n m"], b: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
    return a @ b


@checked
def added(a: Matrix, b: Maybe = None) -> Maybe:
    return a if b is None else a + b


@checked
def halves(a: Float[Tensor, "n m"], b: Float[Tensor, "n m"]) -> Iterator[Tensor]:
    yield from (a, b)


@checked
def length(text: str) -> int:
    return text  # type: ignore[return-value]


@checked
@dataclass(frozen=True)
class Pair:
    first: Float[Tensor, "n"]
    second: Float[Tensor, "n"]


class Holder:
    @checked
    def put(self, number: int) -> Holder:
        return self if number else None  # type: ignore[return-value]


WRONG: dict[str, Any] = {
    "type of an argument": lambda: length(3),
    "type of the result": lambda: length("three"),
    "result of a method": lambda: Holder().put(0),
    "dimensions": lambda: product(torch.ones(2), torch.ones(2, 2)),
    "one axis, two sizes": lambda: product(torch.ones(2, 3), torch.ones(4, 5)),
    "named annotations": lambda: added(torch.ones(2, 3), torch.ones(3, 2)),
    "a generator": lambda: halves(torch.ones(2, 3), torch.ones(3, 2)),
    "fields": lambda: Pair(torch.ones(2), torch.ones(3)),
    "persample": lambda: persample.blocks.full_precision("x"),
    "fngd": lambda: fngd.smw_coefficients("K", 0.1),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_wrong_is_seen(call: Any) -> None:
    with pytest.raises(TypeCheckError):
        call()


def test_right_passes() -> None:
    assert product(torch.ones(2, 3), torch.ones(3, 5)).shape == (2, 5)
    assert added(torch.ones(2, 3), torch.ones(2, 3)).shape == (2, 3)
    assert len(list(halves(torch.ones(2, 3), torch.ones(2, 3)))) == 2
    assert Pair(torch.ones(2), torch.ones(2)).first.shape == (2,)
    assert Holder().put(1)


def test_sizes_are_said() -> None:
    with pytest.raises(TypeCheckError) as violation:
        product(torch.ones(2, 3), torch.ones(4, 5))
    assert not hasattr(violation.value, "add_note") or "n=2\nm=3" in violation.value.__notes__[0]
