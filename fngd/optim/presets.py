"""Presets: options as a public code has them, where its step depends on them and its numbers are others than ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def with_presets(table: Mapping[str | None, Mapping[str, Any]]) -> Callable[[Function], Function]:
    """Returns a decorator of constructors: `preset=` names an entry whose options hold where none are given.

    Arguments:
        table: options by preset; None is no preset.

    >>> @with_presets({None: {}, "slow": {"lr": 0.01}})
    ... def build(self, *, lr=0.1, preset=None):
    ...     print(lr)
    >>> build(None, preset="slow"), build(None, preset="slow", lr=1.0)
    0.01
    1.0
    (None, None)
    """

    def decorate(construct: Function) -> Function:
        @wraps(construct)
        def constructed(self: Any, *args: Any, preset: str | None = None, **given: Any) -> Any:
            if preset not in table:
                raise ValueError(f"preset={preset!r} is unknown; choose one of {list(table)}")
            return construct(self, *args, preset=preset, **{**table[preset], **given})

        return cast(Function, constructed)

    return decorate
