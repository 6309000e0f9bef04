"""Reading a batch: the graph of its losses, and where each parameter meets the data and whose rows are whose there.

model ─▶ losses ─▶ graph ─▶ plan of an earlier batch (`plans`), or attribution (`persample.attribution.uses`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from persample.attribution.owner import Owner
from persample.attribution.separation import Separation
from persample.attribution.uses import Use, find_uses
from persample.capture.plans import Key, Plan, Plans, derived, identities, make
from persample.capture.replay import MISSES, ModelState, losses_of, mode_of, replayable, watched_losses_of
from persample.capture.sum_check import check_graph, check_losses
from persample.capture.types import Problem
from persample.graph.backward import ends
from persample.graph.nodes import Edge, Graph, Node, refuse_nested, trace
from persample.graph.provenance import Provenance
from persample.graph.recomputed import recomputed
from persample.graph.saved import unpacked_by_hooks
from persample.graph.signature import signature

PROBED = (
    "every batch of this model is probed and checked in full: that samples lie alike in each of them is not proven by "
    "the kinds of its operations (see persample.attribution.proof)"
)


@dataclass(frozen=True)
class Reading:
    """What is known of a batch's graph: by the plan of an earlier batch, or by attribution."""

    losses: Tensor
    """[B], with their graph."""
    nodes: Sequence[Node]
    """All of the graph, sources first."""
    ends: list[Edge]
    """Where a backward pass to the uses ends (`persample.graph.backward.ends`)."""
    uses: Mapping[str, list[Use]]
    owners: Mapping[Node, tuple[Owner | None, ...]]
    plan: Plan | None
    known: Separation | None
    """What attribution knows, with z where it was kept; None where a plan was followed."""
    key: Key | None
    traced: Graph | None = None
    shared: bool = False
    """Whether the graph is the caller's, and is still there afterwards."""

    @cached_property
    def graph(self) -> Graph:
        """The graph itself; where a plan was followed, traced when it is asked for."""
        return self.traced or trace(self.losses)

    @cached_property
    def read_once(self) -> bool:
        """Whether saved tensors that a rule may ask for come from hooks (checkpointing, offloading), which give them
        once."""
        return unpacked_by_hooks(list(self.owners))

    @cached_property
    def again(self) -> list[Node]:
        """Nodes of which a checkpoint computes what they have saved again: it can be read beside a pass, too."""
        return recomputed(self.nodes) if self.read_once else []

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        return () if self.plan is None or self.plan.proven else (PROBED,)

    @property
    def turn(self) -> int | None:
        """Which use of a plan is to be verified with this batch, None for none."""
        return None if self.known is not None or self.plan is None else self.plan.turn


@dataclass(frozen=True)
class Found:
    """The graph of losses, and the plan that an earlier batch has left for it."""

    losses: Tensor
    nodes: Sequence[Node]
    """All of the graph, sources first."""
    key: Key | None
    plan: Plan | None
    traced: Graph | None = None

    @cached_property
    def graph(self) -> Graph:
        """The graph itself; where a plan was followed, traced when it is asked for."""
        return self.traced or trace(self.losses)

    def followed(self) -> Reading | None:
        """The reading by the plan; None where there is none that tells owners."""
        plan, nodes = self.plan, self.nodes
        if plan is None or not plan.current():
            return None
        owners = plan.owners_in(lambda: self.graph, nodes, self.losses.shape[0])
        if owners is None:
            return None
        uses, ends = plan.restore(nodes), plan.ends_in(nodes)
        return Reading(self.losses, nodes, ends, uses, owners, plan, None, self.key, self.traced)


def find(losses: Tensor, parameters: Mapping[str, Tensor], plans: Plans | None, coupled: str) -> Found:
    """Returns the graph of losses that are already there, with its plan."""
    losses = check_losses(losses)
    if losses.is_leaf and losses.requires_grad:
        losses = losses.clone()  # they are a parameter themselves: an operation where that is met
    latest = None if plans is None else plans.latest(losses, coupled, parameters)
    if latest is not None:
        key, plan, nodes = latest
        return Found(losses, nodes, key, plan)
    graph = trace(losses)
    check_graph(losses, parameters, graph)
    if plans is None:
        refuse_nested(graph)
        return Found(losses, list(graph.order), None, None, graph)
    key = Key(signature(graph, parameters.values()), coupled, identities(parameters))
    found = plans.find(key)
    if found is None:
        similar = plans.similar(key)
        found = None if similar is None else derived(similar, graph, losses.shape[0])
    return Found(losses, list(graph.order), key, found, graph)


def read(
    losses: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    provenance: Provenance | None = None,
    plans: Plans | None = None,
    coupled: str = "error",
    keep: bool = True,
) -> Reading:
    """Returns the reading of losses that are already there.

    Where a batch is the first of many, z is not kept: attribution takes more passes and no more memory than the graph.
    Where every batch is attributed, time counts; then, and with `keep`, the reading has z.
    """
    found = find(losses, parameters, plans, coupled)
    followed = found.followed()
    if followed is not None:
        return followed
    losses, graph, plan = found.losses, found.graph, found.plan
    every = plans is None or (plan is not None and not plan.proven)
    uses, known = find_uses(graph, losses, parameters, coupled, provenance, keep=keep and every)
    plan = make(graph, uses, known, losses.shape[0]) if plans is not None else None
    owners = {use.node: known.owners[use.node] for places in uses.values() for use in places}
    return Reading(losses, found.nodes, ends(graph, owners), uses, owners, plan, known, found.key, graph)


def run(problem: Problem, plans: Plans, *, keep: bool = True) -> Reading:
    """Runs the model and returns the reading of its losses; see `persample.capture.replay`."""
    trust, mode = plans.trust, mode_of(problem)
    if mode in trust.modes:
        random, before = torch.get_rng_state(), ModelState(problem)
        followed = find(losses_of(problem), problem.parameters, plans, problem.coupled).followed()
        if followed is not None:
            return followed
        trust.missed()
        before.restore()
        torch.set_rng_state(random)
    before = ModelState(problem, values=trust.misses < MISSES)
    losses, provenance = watched_losses_of(problem)
    changed = provenance.wrote or before.written()
    reading = read(losses, problem.parameters, provenance=provenance, plans=plans, coupled=problem.coupled, keep=keep)
    if reading.known is None and trust.misses < MISSES and not changed and replayable(problem):
        trust.modes.add(mode)
    return reading
