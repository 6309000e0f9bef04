"""Models with a batch, on all of which every backend is compared with the slow loop; see ``table``."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from persample.testing.cases.table import TABLE, Case, call

__all__ = ["CASES", "Case", "call", "find", "select"]

# Importing a file adds its cases to the table, in this order.
FILES = (
    *("layers.modules", "architectures.recurrent", "layers.attention"),
    *("usage.usage", "layers.reparametrised", "usage.training", "usage.batches", "usage.layouts", "usage.couplings"),
    *(f"architectures.{each}" for each in ("language", "sequences", "adapters", "vision", "convnets", "graphs")),
    *(f"architectures.{each}" for each in ("pairs", "densities", "fields")),
)
for _file in FILES:
    import_module(f".{_file}", __name__)

CASES: tuple[Case, ...] = tuple(TABLE.values())


def find(name: str) -> Case:
    """The case of that name."""
    if name not in TABLE:
        close = [known for known in TABLE if name.lower() in known.lower()]
        raise KeyError(f"no case {name!r}" + (f"; similar: {', '.join(close[:10])}" if close else ""))
    return TABLE[name]


def select(*, having: Iterable[str] = (), lacking: Iterable[str] = (), coupled: bool | None = None) -> tuple[Case, ...]:
    """The cases with all tags of ``having`` and none of ``lacking``, in the order of the table."""
    wanted, unwanted = frozenset(having), frozenset(lacking)
    return tuple(
        c for c in CASES if wanted <= c.tags and not unwanted & c.tags and (coupled is None or c.coupled == coupled)
    )
