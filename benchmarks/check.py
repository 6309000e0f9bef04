"""The targets, and what became of them: `python -m benchmarks check FILE.json`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import results
from benchmarks.results import Results
from benchmarks.variants import OURS, VARIANTS
from persample.testing.command_line import console

EPOCHS = 100
"""Length of the run for which the price of one coefficient epoch is projected."""

Value = Callable[[dict[str, Any], str], "float | None"]


@dataclass(frozen=True)
class Target:
    """A line of the table: a figure and the most it may be, by model."""

    label: str
    value: Value
    most: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """One cell of the table; `met` is None where the figure is missing."""

    label: str
    model: str
    value: float | None
    most: float

    @property
    def met(self) -> bool | None:
        """Whether the target is met."""
        return None if self.value is None else self.value <= self.most


def time(key: str, reference: str = "plain") -> Value:
    """Median paired ratio of times."""

    def value(model: dict[str, Any], clock: str) -> float | None:
        found = results.ratio(model, key, reference, clock=clock)
        return None if found is None else found.median

    return value


def time_over_limit(key: str) -> Value:
    """Median paired ratio to the plain step plus the time that writing the result's bytes takes."""

    def value(model: dict[str, Any], clock: str) -> float | None:
        found = results.ratio(model, key, plus=VARIANTS[key].limit, clock=clock)
        return None if found is None else found.median

    return value


def memory(*keys: str) -> Value:
    """The largest ratio of peaks."""

    def value(model: dict[str, Any], clock: str) -> float | None:
        found = [results.memory_ratio(model, key) for key in keys]
        known = [ratio for ratio in found if ratio is not None]
        return max(known) if len(known) == len(keys) else None

    return value


def projected(model: dict[str, Any], clock: str) -> float | None:
    """Time of `EPOCHS` epochs, the first of which computes coefficients, over that of plain ones."""
    first, later = time("coefficient")(model, clock), time("stored")(model, clock)
    return None if first is None or later is None else (first + (EPOCHS - 1) * later) / EPOCHS


def _each(mlp: float, resnet20: float, transformer: float) -> dict[str, float]:
    return {"mlp": mlp, "resnet20": resnet20, "transformer": transformer}


TARGETS = (
    Target("FNGD step, stored coefficients", time("stored"), _each(1.04, 1.04, 1.04)),
    Target("FNGD step, computing coefficients", time("coefficient"), _each(1.4, 1.6, 1.6)),
    Target("grads() / (plain + bytes)", time_over_limit("grads"), _each(1.5, 1.5, 1.5)),
    Target("grads(out=…) / (plain + bytes)", time_over_limit("grads_out"), _each(1.5, 1.5, 1.5)),
    Target("norms()", time("norms"), _each(1.10, 1.25, 1.25)),
    Target("gram()", time("gram"), _each(1.3, 1.5, 1.5)),
    Target("clipped_sum()", time("clipped_sum"), _each(1.3, 1.6, 1.5)),
    Target("memory, stored coefficients", memory("stored"), _each(1.03, 1.03, 1.03)),
    Target("memory, norms and Gram", memory("norms", "gram"), _each(1.3, 1.3, 1.3)),
    Target(f"FNGD over {EPOCHS} epochs", projected, _each(1.05, 1.05, 1.05)),
    Target("FNGD compiled / plain compiled", time("stored_compiled", "plain_compiled"), _each(1.05, 1.05, 1.05)),
)


def verdicts(found: Results, clock: str = "wall") -> Iterator[Verdict]:
    """Every cell of the table whose model was measured."""
    for target in TARGETS:
        for name, most in target.most.items():
            if name in found["models"]:
                yield Verdict(target.label, name, target.value(found["models"][name], clock), most)


def faster_peers(found: Results, clock: str = "wall") -> Iterator[str]:
    """A sentence for every model and quantity at which another library is faster."""
    for name, model in found["models"].items():
        for key, variant in VARIANTS.items():
            if variant.library == OURS or model["variants"].get(key, {}).get("status") != "ok":
                continue
            ours = min(
                (mine for mine in OWN.get(variant.what, ()) if results.seconds(model, mine) is not None),
                key=lambda mine: results.seconds(model, mine, clock) or 0.0,
                default=None,
            )
            pair = None if ours is None else results.ratio(model, ours, key, clock=clock)
            if pair is not None and pair.median > 1:
                yield f"{name}, {variant.what}: {VARIANTS[str(ours)].label} takes {pair} × {variant.label}"


WITH_PEERS = ("grads", "norms", "gram", "clipped_sum", "dot", "sum_of_squares", "jacobian", "kernel")
OWN = {what: (what,) for what in WITH_PEERS}
"""What a peer's time is compared with; not grads(out=…), for no peer takes memory of its caller's."""


def show(found: Results, clock: str = "wall") -> bool:
    """Prints the table and the peers that are faster; returns whether all is as it should be."""
    shown = console(width=120)
    cells = list(verdicts(found, clock))
    shown.print(table(cells))
    faster = list(faster_peers(found, clock))
    shown.print("No peer is faster." if not faster else "Peers that are faster:")
    for line in faster:
        shown.print(f"  {line}")
    count = {kind: sum(cell.met is kind for cell in cells) for kind in (True, False, None)}
    shown.print(f"{count[True]} met, {count[False]} missed, {count[None]} not measured ({clock} time)")
    return not faster and not count[False]


def table(cells: list[Verdict]) -> Any:
    """Targets by model."""
    from rich import box
    from rich.table import Table

    models = list(dict.fromkeys(cell.model for cell in cells))
    result = Table(box=box.SIMPLE_HEAD)
    result.add_column("")
    for model in models:
        result.add_column(model, justify="right")
    for label in dict.fromkeys(cell.label for cell in cells):
        row = {cell.model: cell for cell in cells if cell.label == label}
        result.add_row(label, *(_cell(row[model]) if model in row else "" for model in models))
    return result


def _cell(cell: Verdict) -> Any:
    from rich.text import Text

    if cell.met is None:
        return f"–  (≤ {cell.most})"
    colour, word = ("green", "met") if cell.met else ("red", "missed")
    return Text.assemble(f"{cell.value:.3f} ≤ {cell.most} ", (word, colour))
