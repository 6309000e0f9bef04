"""Losses that are already there, and may share forward rows: all outputs of a sample, one for each token, pairs.

losses [N] ─▶ do they share rows (`attribution.groups`)? ─▶ each its own     one pass, as for losses of samples
                                                         ├─▶ C a row         C passes, factors held once a row
                                                         └─▶ all of them     N passes to the parameter, at once
                                                                             where torch's rules for that agree
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from persample.attribution.groups import Grouping, grouping_of, reading_data
from persample.attribution.uses import find_uses
from persample.backends.jacobian import captured, different, of_losses, passes
from persample.backends.outputs import captured_by, check_batch
from persample.blocks.types import Block, Dense
from persample.capture.analysis import Found, Reading, find
from persample.capture.plans import make, plans_of
from persample.capture.types import Capture, Captured
from persample.graph.backward import ends
from persample.graph.nodes import Graph, trace


def capture_losses(losses: Tensor, parameters: Mapping[str, Tensor], *, check: bool = True) -> Capture:
    """Returns the capture of losses that are already there; their graph is kept.

    Nothing tells data from parameters: rows are ∂ℓ_b/∂θ, other samples held fixed.
    """
    plans = plans_of(next(iter(parameters.values())))
    with torch.inference_mode(False), torch.enable_grad():
        found = find(losses, parameters, plans, "error")
        plan = found.plan
        grouping = None if plan is None else plan.grouping
        if plan is None:
            grouping = grouping_of(found.graph, parameters, len(found.losses))
        rows = None if grouping is None else grouping.rows(found.losses)
        reading = _reading(
            found, parameters, grouping, found.losses if rows is None else (rows * different(rows)).sum(1)
        )
        assert reading.plan is not None, "made of every reading here"
        mixed = {name: parameters[name] for name in reading.plan.mixed}
        others = {name: each for name, each in parameters.items() if name not in mixed}
        if grouping is None or rows is None:
            capture = captured_by(reading, others, plans, "error", check=check)
            uses, notes = dict(capture.uses), capture.notes
        else:
            uses, notes = captured(reading, rows), reading.notes
            if check and (reading.known is not None or reading.turn is not None):
                check_batch(of_losses(uses, rows), reading, others, "error", held=True)
            if found.key is not None:
                plans.keep(found.key, reading.plan)
            uses = uses if grouping.contiguous else _in_order(uses, grouping)
        uses.update(_of_each(found.graph, found.losses, mixed))
        return Capture(found.losses.detach(), {name: uses.get(name, ()) for name in parameters}, notes=notes)


def _reading(found: Found, parameters: Mapping[str, Tensor], grouping: Grouping | None, rows: Tensor) -> Reading:
    """The reading of one loss for each row: by the plan, or by attribution."""
    plan, losses = found.plan, rows
    owners = (
        plan.owners_in(lambda: found.graph, found.nodes, len(rows)) if plan is not None and plan.current() else None
    )
    if rows.ndim > 1 and (owners is None or plan is None or plan.turn is not None):
        losses = (rows * different(rows)).sum(1)  # else only their number counts
    if owners is not None and plan is not None:
        uses, last_edges = plan.restore(found.nodes), plan.ends_in(found.nodes)
        return Reading(
            losses, found.nodes, last_edges, uses, owners, plan, None, found.key, traced=found.graph, shared=True
        )
    graph = found.graph if grouping is None else trace(losses)
    last = reading_data(graph, parameters.values())
    keep = plan is not None  # every batch is attributed: time counts
    places, known = find_uses(graph, losses, parameters, "error", None, keep=keep, last=last)
    mixed = tuple(name for name, at in places.items() if not at and id(parameters[name]) in graph.leaves)
    places = {name: at for name, at in places.items() if name not in mixed}
    # nodes of the losses come first in the graph of their sums: positions are the same in both
    plan = replace(make(graph, places, known, len(losses)), grouping=grouping, mixed=mixed)
    if grouping is not None:
        plan.routed = False  # indices tell whose rows are whose for losses, not for groups of them
    owners = {use.node: known.owners[use.node] for at in places.values() for use in at}
    nodes, last_edges = list(graph.order), ends(graph, owners)
    return Reading(losses, nodes, last_edges, places, owners, plan, known, found.key, traced=graph, shared=True)


def _of_each(graph: Graph, losses: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, tuple[Captured, ...]]:
    """The rows of parameters at which losses mix, from a pass for each loss."""
    edges = [(graph.leaves[id(parameter)], 0) for parameter in parameters.values()]
    parts = list(passes(graph, losses[None], edges)) if edges else []
    found: dict[str, tuple[Captured, ...]] = {}
    for place, (name, parameter) in enumerate(parameters.items()):
        many = [part[place] for part in parts]
        if len(many) == 1 and isinstance(many[0], Tensor):
            rows: Tensor | None = many[0]
        else:
            each = [row for part in many for row in part]
            there = any(row is not None for row in each)
            zero = torch.zeros_like(parameter)
            rows = torch.stack([zero if row is None else row.to_dense() for row in each]) if there else None
        if rows is not None:
            found[name] = (Captured(Dense(rows), "every operation", "one pass for each loss"),)
    return found


def _in_order(uses: Mapping[str, tuple[Captured, ...]], grouping: Grouping) -> dict[str, tuple[Captured, ...]]:
    """The rows in the order of the losses."""
    numbers = grouping.rows(torch.arange(grouping.losses)).flatten().argsort()

    def ordered(block: Block) -> Block:
        return block.at(numbers.to(block.device))

    return {name: tuple(replace(use, block=ordered(use.block)) for use in found) for name, found in uses.items()}
