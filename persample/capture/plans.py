"""Plans: what one batch has taught about a model's graph, kept for the next batch with the same graph.

A plan names nodes by their position in the graph, never by reference, so it holds no graph alive. It is keyed by
the graph's signature (kinds, edges, shapes, dimensions, leaves); where `persample.attribution.proof` proves that the
samples' layout follows from the graph alone, its owners are valid for every batch with that signature. A batch of
another size, or of longer sequences, has a graph of the same structure and other shapes: there the proof is made anew,
and takes the place of probing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from persample.attribution.groups import Grouping
from persample.attribution.owner import NOBODY, Owner
from persample.attribution.proof.batching_rules import AxisLayout
from persample.attribution.proof.proven import Proof, owner_at, proven
from persample.attribution.separation import Separation
from persample.attribution.uses import Use
from persample.capture.replay import ReplayPolicy
from persample.graph.backward import ends
from persample.graph.nodes import Edge, Graph, Node, edge_shape
from persample.graph.routes import Route
from persample.graph.signature import Signature, walked
from persample.rules import RULES, Rule

PLANS_PER_MODEL = 16
CHECK_EVERY = 8
"""Of batches with a proven plan, one in this many verifies one use against autograd; every new shape does."""
REGULAR = ("identity", "grouped", "tiled")
"""How samples may lie along an axis, as `Owner.layout` calls it, for a plan to follow the graph alone."""
Owners = dict[Node, tuple[Owner | None, ...]]
UsePositions = tuple[int, int, tuple[int, int], tuple[int, ...]]
"""Node, slot, (source, output) that feeds it, and the route: the parameter's leaf, then its nodes."""


@dataclass
class Plan:
    """Where each parameter meets the data, by position in the graph, and whose rows are whose there."""

    uses: Mapping[str, tuple[UsePositions, ...]]
    """By parameter."""
    owners: Mapping[int, tuple[Owner | None, ...]] | None
    """Owners by node, where proven for every batch; None: to be asked of each batch."""
    routed: bool
    """Whether the indices of a batch tell the owners, where data place rows."""
    ends: tuple[tuple[int, int], ...]
    """Where a backward pass to the uses ends (`persample.graph.backward.ends`): node and output."""
    rules: Mapping[str, Rule | None]
    """The rules the first, fully checked batch was built by."""
    calls: int = 0
    alone: bool = False
    """Whether it was made from a single sample, which is apart everywhere: in operations on parameters alone, too."""
    grouping: Grouping | None = None
    """How several losses share a row, which then counts as a sample; None where each has its own."""
    mixed: tuple[str, ...] = ()
    """Parameters at which rows are not told apart."""

    @property
    def proven(self) -> bool:
        """Whether no batch with such a graph need be probed."""
        return self.owners is not None or self.routed

    @property
    def turn(self) -> int | None:
        """Which use is to be verified with the present batch, None for none."""
        return None if self.calls % CHECK_EVERY else self.calls // CHECK_EVERY

    def current(self) -> bool:
        """Whether the rules are still those that were checked."""
        return all(RULES.get(kind) is rule for kind, rule in self.rules.items())

    def owners_in(self, graph: Callable[[], Graph], nodes: Sequence[Node], batch: int) -> Owners | None:
        """Owners in a graph of the same signature, by node; None where they are to be asked for."""
        if self.owners is not None:
            return {nodes[position]: each for position, each in self.owners.items()}
        if not self.routed:
            return None
        cuts = dict.fromkeys(nodes[position] for uses in self.uses.values() for position, *_ in uses)
        proof = Proof(graph(), batch, cuts)
        if not all(proof.covers(node) for node in cuts):
            return None
        return {node: proof.owners(node) for node in cuts}

    def ends_in(self, nodes: Sequence[Node]) -> list[Edge]:
        """Where a backward pass to the uses ends."""
        return [(nodes[position], output) for position, output in self.ends]

    def restore(self, nodes: Sequence[Node]) -> dict[str, list[Use]]:
        """The uses in a graph of the same signature."""

        def route(source: tuple[int, int], through: tuple[int, ...]) -> Route:
            return Route(nodes[through[0]], (nodes[source[0]], source[1]), tuple(nodes[i] for i in through[1:]))

        return {
            name: [Use(nodes[node], slot, route(source, through)) for node, slot, source, through in uses]
            for name, uses in self.uses.items()
        }


def make(graph: Graph, uses: Mapping[str, list[Use]], known: Separation, batch: int) -> Plan:
    """Returns the plan of a graph whose uses have been found."""
    order = graph.order
    cuts = list(dict.fromkeys(use.node for found in uses.values() for use in found))
    places = proven(graph, cuts, batch) if batch > 1 else {}
    # an output without a gradient, in this batch, has no owner that a later batch could use
    complete = all(found[output] is not None for node, found in known.outputs.items() for output in graph.outputs(node))
    regular = (
        complete
        and places is not None
        and all(
            owner is None or _agrees(owner, places.get((node, output)), batch)
            for node in cuts
            for output, owner in enumerate(known.owners[node])
        )
    )
    return Plan(
        uses={name: tuple(_positions(order, use) for use in found) for name, found in uses.items()},
        owners={order[node]: known.owners[node] for node in cuts} if regular else None,
        routed=not regular and batch > 1 and _told(Proof(graph, batch, cuts), known, cuts),
        ends=tuple((order[node], output) for node, output in ends(graph, cuts)),
        rules={node.name(): RULES.get(node.name()) for node in cuts},
        alone=batch == 1,
    )


def derived(plan: Plan, graph: Graph, batch: int) -> Plan | None:
    """Returns the plan for a graph of the same structure and other shapes, if the layout is proven for that, too."""
    if batch < 2 or not plan.current() or plan.grouping is not None or plan.mixed:
        return None
    if plan.routed:
        return replace(plan, calls=_next_turn(plan))
    if plan.owners is None:
        return None
    nodes = list(graph.order)
    places = proven(graph, [nodes[position] for position in plan.owners], batch)
    if places is None:
        return None
    owners = {}
    for position, before in plan.owners.items():
        node = nodes[position]
        now = tuple(
            None if owner is None else _owner_at(places.get((node, output)), edge_shape((node, output)), batch, owner)
            for output, owner in enumerate(before)
        )
        if any(owner is not None and found is None for owner, found in zip(before, now, strict=True)):
            return None
        owners[position] = now
    return replace(plan, owners=owners, calls=_next_turn(plan))


def _next_turn(plan: Plan) -> int:
    return (plan.calls // CHECK_EVERY + 1) * CHECK_EVERY


def _told(proof: Proof, known: Separation, nodes: Iterable[Node]) -> bool:
    """Whether the proof for this batch tells every owner that was found."""
    return all(
        owner is None or not prod(edge_shape((node, output))) or _same(owner, proof.owner(node, output))
        for node in nodes
        for output, owner in enumerate(known.owners[node])
    )


def _same(owner: Owner, other: Owner | None) -> bool:
    """Whether owners agree, but for rows that are nobody's in one."""
    if other is None or owner.axis != other.axis or owner.ids.shape != other.ids.shape:
        return False
    both = (owner.ids != NOBODY) & (other.ids != NOBODY)
    return torch.equal(owner.ids[both], other.ids[both])


def _owner_at(place: AxisLayout | None, shape: tuple[int, ...], batch: int, like: Owner) -> Owner | None:
    """The owner of entries that lie so, or None where not in a regular pattern."""
    if place is None:
        return None
    owner = owner_at(place, shape, batch, like.ids.device)
    return owner if owner.layout in REGULAR else None


def _positions(order: Mapping[Node, int], use: Use) -> UsePositions:
    source, output = use.route.source
    return (
        order[use.node],
        use.slot,
        (order[source], output),
        tuple(order[n] for n in (use.route.leaf, *use.route.nodes)),
    )


def _agrees(owner: Owner, place: AxisLayout | None, batch: int) -> bool:
    """Whether an owner found by probing lies where the proof says, along one axis in a regular pattern."""
    if batch == 1:
        return True
    return place is not None and owner.axis == place.axis and owner.layout in REGULAR


@dataclass(frozen=True)
class Key:
    """What a plan is for."""

    graph: Signature
    coupled: str
    parameters: tuple[tuple[str, int], ...]
    """Their `identities`."""

    @property
    def structure(self) -> Hashable:
        """The same without the shapes, which may differ from batch to batch."""
        return tuple(part[:2] + part[3:] for part in self.graph), self.coupled, self.parameters


def identities(parameters: Mapping[str, Tensor]) -> tuple[tuple[str, int], ...]:
    """Names and identities of parameters."""
    return tuple([(name, id(parameter)) for name, parameter in parameters.items()])


class Plans:
    """Plans of one model, the latest `PLANS_PER_MODEL` keys; safe to use from several threads."""

    def __init__(self) -> None:
        self._latest: tuple[Key, Plan] | None = None
        self._plans: OrderedDict[Key, Plan] = OrderedDict()
        self._of_structure: OrderedDict[Hashable, Plan] = OrderedDict()
        self._lock = threading.Lock()
        self.trust = ReplayPolicy()

    def find(self, key: Key) -> Plan | None:
        """The plan for a key."""
        with self._lock:
            plan = self._plans.get(key)
            if plan is not None:
                self._plans.move_to_end(key)
                self._latest = key, plan
                plan.calls += 1
            return plan

    def latest(self, losses: Tensor, coupled: str, parameters: Mapping[str, Tensor]) -> tuple[Key, Plan, list] | None:
        """The plan found last, if it is for the graph of the losses, too, and tells owners; with the nodes in order."""
        latest = self._latest
        if latest is None or latest[1].owners is None:
            return None
        key, plan = latest
        if key.coupled != coupled or key.parameters != identities(parameters):
            return None
        nodes = walked(losses, key.graph, parameters)
        if nodes is None:
            return None
        with self._lock:
            plan.calls += 1
        return key, plan, nodes

    def similar(self, key: Key) -> Plan | None:
        """The latest plan for a graph of the same structure, see `derived`; none that was made from a single sample."""
        with self._lock:
            return self._of_structure.get(key.structure)

    def keep(self, key: Key, plan: Plan) -> None:
        """Adds a plan and forgets the one unused longest."""
        with self._lock:
            if self._plans.get(key) is plan:
                return
            self._plans[key] = plan
            if not plan.alone:
                self._of_structure[key.structure] = plan
            for kept in (self._plans, self._of_structure):
                while len(kept) > PLANS_PER_MODEL:
                    kept.popitem(last=False)


_OF_MODEL: WeakIdKeyDictionary = WeakIdKeyDictionary()


def plans_of(owner: nn.Module | Tensor) -> Plans:
    """The plans of a model, or of the first of some parameters; they go when it goes."""
    if owner not in _OF_MODEL:
        _OF_MODEL[owner] = Plans()
    found: Plans = _OF_MODEL[owner]
    return found
