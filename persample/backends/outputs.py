"""Backend `outputs`: the autograd graph itself, so that no operation of the model needs to be known by type.

The per-sample gradient is had from gradients with respect to the *outputs* of the operations that use a
parameter (section IV-C of the FNGD paper); no parameter gradient is computed on the way. Data flow:

    model ─▶ losses ─▶ graph ─▶ plan of an earlier batch, or attribution ─▶ sites (z, owner) ─▶ rules ─▶ blocks

The first batch with a graph is attributed by probing and checked in full. Where the layout is proven to follow
from the graph (`persample.attribution.proof`), later batches cost one backward pass to the outputs, and every
`persample.capture.plans.CHECK_EVERY`-th of them verifies one use in turn. Otherwise each batch is probed and checked in
full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from persample.attribution.separation import Separation, z_at
from persample.attribution.uses import Use
from persample.backends import register
from persample.blocks.precision import coarsest
from persample.blocks.types import Block
from persample.capture.analysis import Reading, read, run
from persample.capture.assemble import capture_use, merged
from persample.capture.plans import Plans, plans_of
from persample.capture.replay import watched_losses_of
from persample.capture.rule_check import check_site, check_use, rounded_away, site_of
from persample.capture.streaming import Stream, Take
from persample.capture.sum_check import SumCheck, binary_weights, sum_error
from persample.capture.types import Capture, Captured, Problem
from persample.errors import CheckError, UnsupportedError
from persample.graph.nodes import Node
from persample.rules import build

HALF = (torch.float16, torch.bfloat16)
LOST = (
    "the gradients that loss.backward() gives in {precision} to {names} are not the sums of the rows: autograd adds so "
    "many numbers there that most are lost beside their sum. The rows, added in float32, are right"
)
CANCELS = (
    "what the gradients of {names} are sums of nearly cancels: rounding in {precision} leaves few digits, in "
    "loss.backward(), too. The rows are as good as those"
)


READ_ONCE = (
    "hold='graph' reads saved tensors once for every reduction, but those of this model come from hooks that give them "
    "once (offloading, or checkpointing in torch before 2.10). Use hold='factors', and chunk_size to save memory"
)


@dataclass(frozen=True)
class HeldGraph:
    """A batch whose autograd graph is held; every `stream` is one backward pass through it."""

    reading: Reading
    check: bool

    def stream(self, take: Take) -> None:
        """Hands over the uses of one parameter after another and keeps none."""
        stream(self.reading, self.reading.turn if self.check else None, take, retain_graph=True)


def hold_graph(problem: Problem) -> HeldGraph:
    """Runs the model and finds the uses of its parameters, checked; what is held is the graph alone.

    Raises:
        UnsupportedError: saved tensors that can be read only once (checkpointing, offloading).
    """
    plans = plans_of(problem.model)
    with torch.inference_mode(False), torch.enable_grad():
        return _held(problem, run(problem, plans, keep=False), plans)


def capture_or_hold(problem: Problem) -> Capture | HeldGraph:
    """Runs the model and captures its losses; of a model that checkpoints to save memory, holds the graph."""
    plans = plans_of(problem.model)
    with torch.inference_mode(False), torch.enable_grad():
        found = run(problem, plans)
        return _held(problem, found, plans) if found.again else _captured(problem, found, plans)


def _held(problem: Problem, found: Reading, plans: Plans) -> HeldGraph:
    if found.read_once and not found.again:
        raise UnsupportedError(READ_ONCE)
    held = HeldGraph(replace(found, known=None), problem.check)
    if found.known is not None and found.plan is not None and found.key is not None:
        if problem.check:
            check_batch(held.stream, found, problem.parameters, problem.coupled, held=True)
        plans.keep(found.key, found.plan)
    return held


def stream(reading: Reading, turn: int | None, take: Take, *, retain_graph: bool = True) -> None:
    """Hands over the uses of one parameter after another and keeps none; `turn`: the use to verify, None for none."""
    check = None if turn is None else check_site
    batch = len(reading.losses)
    passed = Stream(reading.ends, reading.uses, reading.owners, batch, take, check, turn or 0, reading.again)
    passed.run(reading.losses, retain_graph=retain_graph)


def capture_reading(reading: Reading, turn: int | None, take: Take | None = None) -> dict[str, tuple[Captured, ...]]:
    """Every use of every parameter, from z where the reading has it; where not, from a backward pass.

    The pass consumes the graph where there is a proven plan. Elsewhere samples may meet a parameter on the way to
    another use of it, by operations that rows are pulled back through later.

    Args:
        reading: of the batch.
        turn: the use to verify, None for no check.
        take: gets the uses of one parameter after another, early.
    """
    uses, batch = reading.uses, len(reading.losses)
    known = reading.known if reading.known is not None and reading.known.keep else None
    if known is None and reading.read_once and not reading.again:
        known = known_again(reading)
    if known is not None:
        with torch.no_grad():
            if turn is not None:
                check_use(uses, known, batch, turn)
            built = build_uses(uses, known, batch)
            if take is not None:
                for name, found in built.items():
                    take(name, found)
        return built
    captured: dict[str, tuple[Captured, ...]] = {}
    versions: list[tuple[str, Tensor, int]] = []

    def arrive(name: str, found: tuple[Captured, ...]) -> None:
        captured[name] = found
        versions.extend((name, f, f._version) for each in found for f in each.block.factors if not f.is_inference())
        if take is not None:
            take(name, found)

    stream(reading, turn, arrive, retain_graph=reading.shared or reading.plan is None or not reading.plan.proven)
    for name, factor, version in versions:
        if factor._version != version:
            raise CheckError(
                f"an operation's backward writes into a tensor that the gradient of {name!r} is formed from; a custom "
                "autograd Function must not change its arguments in place"
            )
    return {name: captured[name] for name in uses}


def known_again(reading: Reading, uses: Sequence[Use] | None = None) -> Separation:
    """z at some uses, by default all, with the owners: one backward pass, after which the graph is still there."""
    nodes = list(reading.owners) if uses is None else list(dict.fromkeys(use.node for use in uses))
    owners = {node: reading.owners[node] for node in nodes}
    return Separation(zs=z_at(reading.graph, reading.losses, nodes), owners=owners)


def build_uses(
    uses: Mapping[str, list[Use]], known: Separation, batch: int, read: dict[Node, dict[str, Any]] | None = None
) -> dict[str, tuple[Captured, ...]]:
    """The blocks of every use of every parameter; `read` gets what was read of nodes, and is not read again."""
    built: dict[tuple, tuple[Block, str]] = {}
    captured = {}
    for name, places in uses.items():
        found = []
        for use in places:
            key = (use.node, use.slot)
            if key not in built:
                site = site_of(use, known, batch)
                built[key] = build(site if read is None else replace(site, read=read.setdefault(use.node, {})))
            found.append(capture_use(use, *built[key]))
        captured[name] = merged(found)
    return captured


def check_batch(
    blocks: Callable[[Take], object], reading: Reading, parameters: Mapping[str, Tensor], coupled: str, *, held: bool
) -> tuple[str, ...]:
    """Every parameter against autograd's gradient of weighted losses: one ordinary backward pass.

    Where they differ, and the graph is still `held`, it is found out whether that is rounding. Returns what it has
    found out about that gradient.
    """
    losses = reading.losses
    if not parameters:
        return ()
    # the row reading of coupled samples adds up, and promises no more
    weights = torch.ones_like(losses) if coupled == "rows" else binary_weights(losses.detach())

    def gradient(names: Sequence[str]) -> dict[str, Tensor | None]:
        asked = [parameters[name] for name in names]
        found = torch.autograd.grad(losses, asked, weights, retain_graph=True, allow_unused=True)
        return dict(zip(names, found, strict=True))

    sums = SumCheck(weights, gradient(list(parameters)))
    with torch.no_grad():
        blocks(sums.add)
    precision = precision_of(reading, parameters)
    missed = sums.misses(precision)
    for name, (miss, norm) in missed.items():
        whole, found = gradient([name])[name] if held else None, reading.uses.get(name, ())
        try:
            rounding = whole is not None and rounded_away(found, known_again(reading, found), weights, whole)
        except CheckError:  # it is the rule of a use that is wrong
            rounding = False
        if not rounding:
            raise sum_error(name, miss, norm, precision=precision, backend="outputs")
    note = LOST if precision in HALF else CANCELS
    return (note.format(names=", ".join(missed), precision=precision),) if missed else ()


def precision_of(reading: Reading, parameters: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype with the largest rounding error: of the losses, the parameters and z where it was attributed."""
    known = {} if reading.known is None else reading.known.outputs
    dtypes = [z.dtype for found in known.values() for z in found if z is not None]
    dtypes.append(coarsest(reading.losses, *parameters.values()))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def captured_by(
    reading: Reading, parameters: Mapping[str, Tensor], plans: Plans | None, coupled: str, *, check: bool
) -> Capture:
    """Returns the capture of a batch that has been read. With `plans` its graph is consumed, as by `backward()`."""
    captured: dict[str, tuple[Captured, ...]] = {}
    notes = reading.notes
    if not check or reading.known is None:
        captured = capture_reading(reading, reading.turn if check else None)
    elif precision_of(reading, parameters) in HALF and not reading.known.keep and not reading.read_once:
        # the check may ask for z again: the graph stays until it is done, so nothing else is held meanwhile
        notes += check_batch(partial(stream, reading, None), reading, parameters, coupled, held=True)
        captured = capture_reading(reading, None)
    else:

        def blocks(take: Take) -> None:
            captured.update(capture_reading(reading, None, take))

        notes += check_batch(blocks, reading, parameters, coupled, held=reading.known.keep)
    if plans is not None and reading.plan is not None and reading.key is not None:
        plans.keep(reading.key, reading.plan)  # only what the check has passed
    return Capture(reading.losses.detach(), captured, notes=notes)


@register("outputs", covers="every operation: rules for the common ones, the generic node rule for the rest")
def capture(problem: Problem) -> Capture:
    """Runs the model and captures its losses."""
    plans = plans_of(problem.model)
    with torch.inference_mode(False), torch.enable_grad():
        return _captured(problem, run(problem, plans), plans)


def _captured(problem: Problem, reading: Reading, plans: Plans) -> Capture:
    try:
        return captured_by(reading, problem.parameters, plans, problem.coupled, check=problem.check)
    except CheckError as error:
        if not problem.check or reading.known is None or reading.known.keep:
            raise
        missed = error
    # The graph is gone. With another one that is held, it can be found out whether it is rounding that differs.
    losses, provenance = watched_losses_of(problem)
    reading = read(losses, problem.parameters, provenance=provenance, coupled=problem.coupled)
    try:
        return captured_by(reading, problem.parameters, None, problem.coupled, check=True)
    except CheckError:
        raise missed from None
