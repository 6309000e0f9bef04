"""Wrong options get one clear sentence in every optimiser: what was called, what was given, what is allowed."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fngd
from fngd.optim.checks import OPTIONS

ALL = ("NGD", "FNGD", "KFAC", "EKFAC", "MBF", "HyLo", "SKFAC", "Eva", "Shampoo", "GaussNewton")
NEEDED = {"FNGD": {"steps_per_epoch": 2}, "HyLo": {"steps_per_epoch": 2}}


def build(name: str, **options: Any) -> Any:
    model = nn.Linear(3, 2)
    first = model.parameters() if name == "Shampoo" else model
    return getattr(fngd, name)(first, **{**NEEDED.get(name, {}), **options})


def has(name: str, option: str) -> bool:
    return option in inspect.signature(getattr(fngd, name)).parameters


WRONG: dict[str, Any] = {
    "lr": "0.1", "momentum": 2, "weight_decay": -1, "damping": "x", "alpha": "x", "steps_per_epoch": 2.5,
    "average": 1.0, "kl_clip": 0, "block": 0, "decay": 1.5, "epsilon": math.nan, "keep": True, "every": 0.5,
    "nesterov": "yes", "functions": 1, "refresh_cosine": 2, "samples": -3, "seed": "a", "graft": 0,
    "max_samples": 1.0, "rank": 0, "threshold": -1,
    "curvature_samples": 0, "curvature_every": 0, "history": 0, "chunk_size": 0,
    "divide_inverses": 1, "diagnostics": "no", "foreach": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("option", WRONG)
def test_an_option_out_of_range(name: str, option: str) -> None:
    if not has(name, option):
        return
    value = WRONG[option]
    with pytest.raises(ValueError) as told:
        build(name, **{option: value})
    assert str(told.value).startswith(f"{option}={value!r}")
    if option in ("lr", "alpha", "seed"):
        assert "str" in str(told.value)


@given(name=st.sampled_from(ALL), option=st.sampled_from(["lr", "momentum", "weight_decay"]), data=st.data())
def test_numbers_that_are_none(name: str, option: str, data: st.DataObject) -> None:
    if not has(name, option):
        return
    numbers = st.floats(max_value=-1e-30) | st.sampled_from([math.nan, math.inf, True, "1", (1,), None])
    value = data.draw(numbers)
    with pytest.raises(ValueError, match=f"^{option}="):
        build(name, **{option: value})
    opt = build(name)
    if option in opt.param_groups[0]:
        with pytest.raises(ValueError, match=f"^{option}="):
            opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], option: value})


@pytest.mark.parametrize("name", ALL)
def test_an_unknown_option_is_told_by_what_was_called(name: str) -> None:
    with pytest.raises(
        TypeError, match=f"^{name} has no option 'momentumm' .nearest: 'momentum'.; its options are .*'lr'"
    ):
        build(name, momentumm=0.9)
    kind = type("Mine", (getattr(fngd, name),), {})
    with pytest.raises(TypeError, match=r"^Mine has no option 'zzz'; its options"):
        kind(nn.Linear(2, 2), zzz=1)


@pytest.mark.parametrize("name", ALL)
def test_wrong_arguments_by_position(name: str) -> None:
    kind = getattr(fngd, name)
    with pytest.raises(TypeError, match=f"{name}.*got str"):
        kind("model", lr=0.1)
    with pytest.raises(TypeError, match=f"^{name} .*by position and all else by name"):
        kind(nn.Linear(2, 2), None, 0.1)
    with pytest.raises(TypeError, match=f"^{name} needs (model|params)"):
        kind(lr=0.1)
    if has(name, "model"):
        with pytest.raises(TypeError, match=f"^{name}: params are .* Got float; other options go by name"):
            kind(nn.Linear(2, 2), 0.1)


def test_options_that_pass_through_a_class_of_the_user() -> None:
    class Mine(fngd.FNGD):
        def __init__(self, model: nn.Module, extra: int = 0, **options: Any) -> None:
            super().__init__(model, **options)

    with pytest.raises(TypeError, match=r"^Mine has no option 'beta'.*; its options are .'model', 'extra'"):
        Mine(nn.Linear(2, 2), lr=0.1, steps_per_epoch=2, beta=0.9)
    with pytest.raises(ValueError, match=r"^lr='0.1'.*str"):
        Mine(nn.Linear(2, 2), lr="0.1", steps_per_epoch=2)


def test_the_rule_of_other_parameters_is_checked_before_there_are_any() -> None:
    for options in ({"betas": (0.9, 1.0)}, {"betas": 0.9}, {"lr": -1}, {"eps": "x"}):
        (option,) = options
        with pytest.raises(ValueError, match=f"^{option}="):
            fngd.KFAC(nn.Linear(2, 2), other="adamw", other_options=options)


@pytest.mark.parametrize("name", ALL)
def test_defaults_and_tensors_are_accepted(name: str) -> None:
    signature = inspect.signature(getattr(fngd, name)).parameters
    given = {option: signature[option].default for option in OPTIONS if option in signature}
    build(name, **{**given, **NEEDED.get(name, {})})
    if name == "GaussNewton":
        return
    assert float(build(name, lr=torch.tensor(0.1)).param_groups[0]["lr"]) == pytest.approx(0.1)
