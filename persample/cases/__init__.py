"""Models with a batch on which every backend is compared with the loop over samples; see ``table`` for what a case is."""

from __future__ import annotations

from collections.abc import Iterable

from . import architectures, attention, couplings, language, layouts, modules, recurrent, usage, vision
from .table import TABLE, Case, call

__all__ = ["CASES", "Case", "call", "find", "select"]

_FILES = (modules, recurrent, attention, usage, layouts, couplings, language, vision, architectures)
CASES: tuple[Case, ...] = tuple(TABLE.values())


def find(name: str) -> Case:
    """The case of that name."""
    if name not in TABLE:
        close = [known for known in TABLE if name.lower() in known.lower()]
        raise KeyError(f"no case {name!r}" + (f"; similar: {', '.join(close[:10])}" if close else ""))
    return TABLE[name]


def select(
    *, having: Iterable[str] = (), lacking: Iterable[str] = (), coupled: bool | None = None
) -> tuple[Case, ...]:
    """The cases with all tags of ``having`` and none of ``lacking``, in the order of the table."""
    having, lacking = frozenset(having), frozenset(lacking)
    return tuple(
        c
        for c in CASES
        if having <= c.tags and not lacking & c.tags and (coupled is None or c.coupled == coupled)
    )
