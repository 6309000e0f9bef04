"""Backend `outputs`: the autograd graph itself, so that no operation of the model needs to be known by type.

The per-sample gradient is had from gradients with respect to the *outputs* of the operations that use a
parameter (section IV-C of the FNGD paper); no parameter gradient is computed on the way. Data flow:

    model ─▶ losses ─▶ graph ─▶ plan of an earlier batch, or `persample.uses` ─▶ sites (z, owner) ─▶ rules ─▶ blocks

The first batch with a graph is attributed by probing and checked in full. Where the layout is proven to follow
from the graph (`persample.layout`), later batches cost one backward pass to the outputs, and every
`CHECK_EVERY`-th of them verifies one use in turn. Otherwise each batch is probed and checked in full.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from persample.backends import Capture, Captured, Problem, register
from persample.blocks import Block
from persample.captured import capture_use, merged
from persample.checks import check_losses, check_sum
from persample.errors import CheckError
from persample.graph import Graph, call_node, sum_to, trace
from persample.plans import Plan, Plans, edges, make, plans_of, signature
from persample.precision import coarsest
from persample.provenance import Provenance
from persample.rules import Site, build
from persample.streaming import Stream, unpacked_by_hooks
from persample.uses import Separation, Use, find_uses

PROBED = (
    "every batch of this model is probed and checked in full: that samples lie alike in each of them is not proven by "
    "the kinds of its operations (see persample.layout)"
)
CHECK_EVERY = 8
"""Of the batches with a proven plan, one in this many verifies one use against autograd."""


def capture_losses(
    losses: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    provenance: Provenance | None = None,
    plans: Plans | None = None,
    coupled: str = "error",
    check: bool = True,
) -> Capture:
    """Returns the capture of losses that are already there.

    Without `provenance` nothing tells data from parameters: rows are ∂ℓ_b/∂θ, other samples held fixed. Without
    `plans` the graph of the losses is kept; with them it is consumed, as by `backward()`.
    """
    losses = check_losses(losses)
    graph = trace(losses)
    key = (signature(graph), coupled, tuple(parameters)) if plans is not None else None
    plan = plans.find(key) if plans is not None else None
    if plan is not None and plan.owners is not None and plan.current():
        turn = plan.calls // CHECK_EVERY if check and plan.calls % CHECK_EVERY == 0 else None
        return Capture(losses.detach(), captured_by_plan(plan, graph, losses, turn))
    uses, known = find_uses(graph, losses, parameters, coupled, provenance)
    if plans is not None:
        plan = make(graph, uses, known, losses.shape[0])
    with torch.no_grad():
        captured = build_uses(uses, known, losses.shape[0])
    result = Capture(losses.detach(), captured, notes=() if plan is None or plan.owners is not None else (PROBED,))
    if check:
        check_batch(result, losses, parameters, known)
    if plans is not None and plan is not None:
        plans.keep(key, plan)  # only what the check has passed
    return result


def captured_by_plan(plan: Plan, graph: Graph, losses: Tensor, turn: int | None) -> dict[str, tuple[Captured, ...]]:
    """Every use of every parameter, from one backward pass; `turn`: the use to verify, None for no check."""
    batch, uses = losses.shape[0], plan.restore(graph)
    nodes = list(graph.order)
    owners = {nodes[position]: each for position, each in (plan.owners or {}).items()}
    if unpacked_by_hooks(list(owners)):
        known = outputs_by_plan(plan, graph, losses)
        with torch.no_grad():
            if turn is not None:
                check_use(uses, known, batch, turn)
            return build_uses(uses, known, batch)
    captured: dict[str, tuple[Captured, ...]] = {}
    versions: list[tuple[str, Tensor, int]] = []

    def take(name: str, found: tuple[Captured, ...]) -> None:
        captured[name] = found
        versions.extend((name, f, f._version) for each in found for f in each.block.factors if not f.is_inference())

    check = None if turn is None else check_site
    stream = Stream(graph, uses, owners, batch, take, check, turn or 0)
    stream.run(losses, [nodes[position] for position in plan.ends])
    for name, factor, version in versions:
        if factor._version != version:
            raise CheckError(
                f"an operation's backward writes into a tensor that the gradient of {name!r} is formed from; a custom "
                "autograd Function must not change its arguments in place"
            )
    return {name: captured[name] for name in uses}


def outputs_by_plan(plan: Plan, graph: Graph, losses: Tensor) -> Separation:
    """z at the plan's edges, with the plan's owners: one backward pass, after which the graph is still there."""
    wanted = edges(plan, graph)
    known = Separation()
    if not wanted:
        return known
    found = torch.autograd.grad(
        losses, [GradientEdge(*edge) for edge in wanted], torch.ones_like(losses), retain_graph=True, allow_unused=True
    )
    zs: dict = {}
    for (node, output), z in zip(wanted, found, strict=True):
        zs.setdefault(node, {})[output] = z
    for node, of_output in zs.items():
        owners = (plan.owners or {})[graph.order[node]]
        known.zs[node] = tuple(of_output.get(output) for output in range(len(owners)))
        known.owners[node] = owners
    return known


def build_uses(uses: Mapping[str, list[Use]], known: Separation, batch: int) -> dict[str, tuple[Captured, ...]]:
    """The blocks of every use of every parameter."""
    built: dict[tuple, tuple[Block, str]] = {}
    captured = {}
    for name, places in uses.items():
        found = []
        for use in places:
            key = (use.node, use.slot)
            if key not in built:
                built[key] = build(site_of(use, known, batch))
            found.append(capture_use(use, *built[key]))
        captured[name] = merged(found)
    return captured


def site_of(use: Use, known: Separation, batch: int) -> Site:
    """The site of a use."""
    return Site(use.node, use.slot, known.zs[use.node], known.owners[use.node], batch)


def check_batch(result: Capture, losses: Tensor, parameters: Mapping[str, Tensor], known: Separation) -> None:
    """Every parameter against autograd's gradient of the summed loss: one ordinary backward pass."""
    if not parameters or not losses.requires_grad:
        return
    total = torch.autograd.grad(
        losses, list(parameters.values()), torch.ones_like(losses), retain_graph=True, allow_unused=True
    )
    check_sum(
        result.blocks,
        dict(zip(parameters, total, strict=True)),
        precision=coarsest(losses, *parameters.values(), *(z for zs in known.zs.values() for z in filter_none(zs))),
        backend="outputs",
    )


def check_use(uses: Mapping[str, list[Use]], known: Separation, batch: int, turn: int) -> None:
    """One use, in turn, against the node's own gradient."""
    places = list(dict.fromkeys((use.node, use.slot) for found in uses.values() for use in found))
    if places:
        node, slot = places[turn % len(places)]
        site = Site(node, slot, known.zs[node], known.owners[node], batch)
        check_site(site, build(site)[0])


def check_site(site: Site, block: Block) -> None:
    """The block of one use against the node's own gradient."""
    # copies: a custom backward may work in place
    whole = call_node(site.node, [None if z is None else z.clone() for z in site.zs])[site.slot]
    expected = None if whole is None else sum_to(whole[None], (1, *site.input_shape))[0]
    what, precision = f"an input of {site.node.name()}", coarsest(*filter_none(site.zs))
    check_sum({what: [block]}, {what: expected}, precision=precision, backend="outputs")


def filter_none(tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    """The tensors that are there."""
    return [tensor for tensor in tensors if tensor is not None]


@register("outputs", covers="every operation: rules for the common ones, the generic node rule for the rest")
def capture(problem: Problem) -> Capture:
    """Runs the model and captures its losses."""
    provenance = Provenance()
    provenance.follow(problem.inputs)
    # inference mode is left as well: its tensors can be inputs, but no operation on them would be recorded
    with torch.inference_mode(False), torch.enable_grad():
        with provenance.named(problem.model), provenance:
            losses = problem.loss_fn(problem.outputs(), problem.targets)
        return capture_losses(
            losses,
            problem.parameters,
            provenance=provenance,
            plans=plans_of(problem.model),
            coupled=problem.coupled,
            check=problem.check,
        )
