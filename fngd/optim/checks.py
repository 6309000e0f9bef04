"""What the options of the optimisers may be: one table, from an option's name to what it must be.

Constructors are called through `Checked`, and parameter groups through `check_options`, so that each option has one
sentence, whichever optimiser it was given to, and a name that no optimiser knows is told by the one that was called.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from numbers import Integral
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from fngd.coefficients import is_number

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Kind:
    """What an option may be: the words for it, what type of value it is `of`, and whether one of that type `holds`."""

    must: str
    holds: Callable[[Any], bool] = lambda value: True
    of: Callable[[Any], bool] = lambda value: True
    or_none: bool = False
    """Whether None says something though another value is the default."""

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError unless the value is of this kind."""
        if value is None and self.or_none:
            return
        if not self.of(value):
            raise ValueError(f"{name}={value!r}; it must be {self.must}, and is a {type(value).__name__}")
        if not self.holds(value):
            raise ValueError(f"{name}={value!r}; it must be {self.must}")


def _is_one_number(value: Any) -> bool:
    return is_number(value) and (not isinstance(value, Tensor) or value.numel() == 1)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b"  # NumPy's


def _number(must: str, holds: Callable[[Any], bool], *, or_none: bool = False) -> Kind:
    return Kind(must, lambda value: bool(holds(value)), _is_one_number, or_none)


def _pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_one_number, value))


NOT_NEGATIVE = _number("at least 0 and finite", lambda value: 0 <= value < math.inf)
POSITIVE = _number("a number > 0", lambda value: value > 0)  # NaN is none
FRACTION = _number("at least 0 and less than 1", lambda value: 0 <= value < 1)
COUNT = Kind("a whole number of at least 1", lambda value: value >= 1, _is_whole)
TRUTH = Kind("True or False", _is_truth)
RATE = _number("> 0 and finite (1 is the full Gauss–Newton step)", lambda value: 0 < value < math.inf)

OPTIONS: Mapping[str, Kind] = {
    **dict.fromkeys(("lr", "weight_decay", "eps"), NOT_NEGATIVE),
    **dict.fromkeys(("momentum", "average"), FRACTION),
    **dict.fromkeys(("damping", "epsilon"), POSITIVE),
    **dict.fromkeys(
        (
            "statistics_every",
            "inverse_every",
            "every",
            "keep",
            "block",
            "refresh_epochs",
            "samples",
            "chunk_size",
            "max_samples",
            "curvature_samples",
            "curvature_every",
            "history",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            "nesterov",
            "decoupled_weight_decay",
            "precondition",
            "diagnostics",
            "functions",
            "foreach",
            "graft",
            "line_search",
            "acceleration",
            "divide_inverses",
            "check",
        ),
        TRUTH,
    ),
    "steps_per_epoch": Kind("a whole number of at least 1 (give len(loader))", COUNT.holds, COUNT.of),
    "alpha": _number("> 0 (a good start is alpha=1e-2; 1 is nearly plain SGD)", lambda value: value > 0, or_none=True),
    "kl_clip": _number("> 0 (1e-3 is usual), or None for no clipping", lambda value: value > 0, or_none=True),
    "rank": _number("greater than 0 and at most 1, as a share of the batch", lambda value: 0 < value <= 1),
    "threshold": _number("at least 0", lambda value: value >= 0),
    "decay": _number("greater than 0 and at most 1", lambda value: 0 < value <= 1),
    "refresh_cosine": _number("in (0, 1], as the cosine of two vectors", lambda value: 0 < value <= 1),
    "seed": Kind("a whole number", of=_is_whole),
    "betas": Kind("two numbers, each at least 0 and less than 1", lambda pair: all(map(FRACTION.holds, pair)), _pair),
}
"""What an option of that name must be, in whichever optimiser. Choices among words are checked where they are made."""


def check_options(options: Mapping[str, Any], kinds: Mapping[str, Kind] = OPTIONS) -> None:
    """Raises ValueError for the first option that is out of range.

    >>> check_options({"lr": "0.1"})
    Traceback (most recent call last):
    ...
    ValueError: lr='0.1'; it must be at least 0 and finite, and is a str
    """
    for name, value in options.items():
        if name in kinds:
            kinds[name].check(name, value)


class Checked:
    """Part of an optimiser: what its constructor is given is checked before the constructor runs."""

    _kinds: ClassVar[Mapping[str, Kind]] = {}
    """Where an option of this optimiser is another one than those of that name."""
    _models_as_params: ClassVar[bool] = False
    """Whether a model may be given in place of its parameters."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The class is shown as its constructor; Python 3.10 would show `__new__`."""
        super().__init_subclass__(**kwargs)
        own = inspect.signature(cls.__init__)
        cls.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])  # type: ignore[attr-defined]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Checks names, then values; a copy is made with neither."""
        if args or kwargs:
            check_options(_bound(cls, args, kwargs), {**OPTIONS, **cls._kinds})
        return super().__new__(cls)


def _bound(kind: type, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, but for those that are None by default and None.

    Raises TypeError for names that the constructor has not, for too many arguments by position or a missing one, and
    where the model or the parameters are something else.
    """
    known = _parameters(kind)
    ordered = [name for name, each in known.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    if len(args) > len(ordered):
        raise TypeError(
            f"{kind.__name__} takes {' and '.join(ordered)} by position and all else by name, as lr=0.1; "
            f"got {len(args)} arguments by position"
        )
    unknown = [name for name in kwargs if name not in known]
    if unknown:
        near = [(name, get_close_matches(name, known, 1)) for name in unknown]
        named = [f"{name!r} (nearest: {found[0]!r})" if found else repr(name) for name, found in near]
        raise TypeError(f"{kind.__name__} has no option {', '.join(named)}; its options are {list(known)}")
    given = {**dict(zip(ordered, args, strict=False)), **kwargs}
    missing = [name for name, each in known.items() if each.default is each.empty and name not in given]
    if missing:
        raise TypeError(f"{kind.__name__} needs {', '.join(missing)}: {kind.__name__}({', '.join(ordered)}, lr=…)")
    given = {name: value for name, value in given.items() if value is not None or known[name].default is not None}
    if "model" in given:
        _refuse_no_model(kind.__name__, given["model"])
    if "params" in given:
        _refuse_no_parameters(kind, given["params"], "model" in known)
    return given


@lru_cache
def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """The arguments of the constructor by name; of one that passes `**options` on, those of the next one, too."""
    found: dict[str, inspect.Parameter] = {}
    for each in kind.__mro__:
        if "__init__" not in vars(each):
            continue
        parameters = list(inspect.signature(vars(each)["__init__"]).parameters.values())[1:]
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        found |= {p.name: p for p in parameters if p.kind not in variable and p.name not in found}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _refuse_no_model(method: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{method} looks at the layers of a model: give the model itself, {method}(model, lr=...), not its "
            f"parameters; got {type(model).__name__}. To optimise some parameters alone name them by params="
        )


def _refuse_no_parameters(kind: type, params: Any, of_model: bool) -> None:
    if isinstance(params, nn.Module) and getattr(kind, "_models_as_params", False):
        return
    if isinstance(params, Iterable) and not isinstance(params, str | bytes | Mapping | Tensor | nn.Module):
        return
    name, got = kind.__name__, type(params).__name__
    if of_model:
        raise TypeError(
            f"{name}: params are those parameters of the model, or parameter groups, that it is to step; by default "
            f"all. Got {got}; other options go by name, as lr=0.1"
        )
    raise TypeError(f"{name} takes parameters, or parameter groups: give model.parameters(); got {got}")


def showing(options_of: Callable[..., Any]) -> Callable[[Function], Function]:
    """Returns a decorator: `help()` and `inspect.signature` show another function's keywords, not `**options`."""

    def decorate(function: Function) -> Function:
        own = inspect.signature(function)
        kept = {name: p for name, p in own.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
        shown = inspect.signature(options_of).parameters
        more = [p for name, p in shown.items() if p.kind is inspect.Parameter.KEYWORD_ONLY and name not in kept]
        function.__signature__ = own.replace(parameters=[*kept.values(), *more])  # type: ignore[attr-defined]
        return function

    return decorate
