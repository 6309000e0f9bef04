"""What a saved state must look like, so that anything else is told in a sentence and not in the middle of loading.

A form is one of

    a type, or a tuple of types    what isinstance says; True and False are no numbers
    Maybe(form)                    that, or None
    {name: form, "name?": form}    a mapping that has these entries; with ? it may be without; others are not looked at
    Table(key, value)              a mapping of any length
    [form]                         a list or tuple of any length
    Where(form, holds, words)      that, if holds(value)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Maybe:
    """That, or None."""

    form: Any


@dataclass(frozen=True)
class Table:
    """A mapping whose keys and values have these forms."""

    key: Any
    value: Any


@dataclass(frozen=True)
class Where:
    """That, with a condition and the words for it."""

    form: Any
    holds: Callable[[Any], bool]
    words: str


COUNT = Where(int, lambda value: value >= 0, "a whole number of at least 0")
NUMBER = (int, float)


def check_form(value: Any, form: Any, what: str) -> None:
    """Raises ValueError, naming the entry, where a value has not the form; `what`: what the value is called;
    empty for the state itself.

    >>> check_form({"epoch": None}, {"epoch": COUNT}, "coefficients")
    Traceback (most recent call last):
    ...
    ValueError: the state's coefficients['epoch'] is None; it must be int...
    """
    if isinstance(form, Maybe):
        if value is not None:
            check_form(value, form.form, what)
    elif isinstance(form, Where):
        check_form(value, form.form, what)
        if not form.holds(value):
            raise _wrong(value, form.words, what)
    elif isinstance(form, dict | Table):
        if not isinstance(value, Mapping):
            raise _wrong(value, "a dict", what)
        entries = form.items() if isinstance(form, dict) else ((key, form.value) for key in value)
        for name, inner in entries:
            key = name.removesuffix("?") if isinstance(form, dict) else name
            if isinstance(form, Table):
                check_form(key, form.key, f"{what}: a key")
            if key in value:
                check_form(value[key], inner, f"{what}[{key!r}]" if what else repr(key))
            elif not name.endswith("?"):
                raise ValueError(f"the state{_of(what)} has no {key!r}; it has {sorted(map(str, value))}. {REMEDY}")
    elif isinstance(form, list):
        if not isinstance(value, list | tuple):
            raise _wrong(value, "a list", what)
        for place, each in enumerate(value):
            check_form(each, form[0], f"{what}[{place}]")
    else:
        types = form if isinstance(form, tuple) else (form,)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise _wrong(value, " or ".join(each.__name__ for each in types), what)


REMEDY = "Load what state_dict() of such an optimiser returned, as it is; nothing has been loaded"


def _wrong(value: Any, wanted: str, what: str) -> ValueError:
    shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    shown = shown if len(shown) <= 60 else f"a {type(value).__name__}"
    return ValueError(f"the state{_of(what)} is {shown}; it must be {wanted}. {REMEDY}")


def _of(what: str) -> str:
    return f"'s {what}" if what else ""
