"""Backend `outputs`: the autograd graph itself, so that no operation of the model needs to be known by type.

The per-sample gradient is had from gradients with respect to the *outputs* of the operations that use a
parameter (section IV-C of the FNGD paper); no parameter gradient is computed on the way. Data flow:

    model ─▶ losses ─▶ graph ─▶ plan of an earlier batch, or `persample.uses` ─▶ sites (z, owner) ─▶ rules ─▶ blocks

The first batch with a graph is attributed by probing and checked in full. Where the layout is proven to follow
from the graph (`persample.layout`), later batches cost one backward pass to the outputs, and every
`CHECK_EVERY`-th of them verifies one use in turn. Otherwise each batch is probed and checked in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from persample.backends import Capture, Captured, Problem, register
from persample.blocks import Block, Dense, Outer, Pulled
from persample.checks import check_losses, check_sum
from persample.graph import Graph, Route, call_node, sum_to, trace
from persample.plans import Plan, Plans, edges, make, plans_of, signature
from persample.precision import coarsest, full_precision
from persample.provenance import Provenance
from persample.rules import Site, build
from persample.uses import Separation, Use, find_uses

PROBED = (
    "every batch of this model is probed and checked in full: that samples lie alike in each of them is not proven by "
    "the kinds of its operations (see persample.layout)"
)
CHECK_EVERY = 8
"""Of the batches with a proven plan, one in this many verifies one use against autograd."""


def pulled(block: Block, path: Route) -> Block:
    """The block behind the operations between the parameter and its use."""
    if not path.nodes:
        return block
    if path.names in (["TBackward0"], ["TransposeBackward0"]) and isinstance(block, Outer):
        return block.transposed
    shape = tuple(path.leaf.variable.shape)
    if isinstance(block, Dense):
        return Dense(path.pull(block.values))
    return Pulled(block, path.pull, shape, path.isometric)


def merged(uses: list[Captured]) -> tuple[Captured, ...]:
    """Uses with the same kind of block made one: a recurrent weight, a module called twice."""
    joined: list[Captured] = []
    outer = [use.block for use in uses if isinstance(use.block, Outer)]
    dense = [use.block for use in uses if isinstance(use.block, Dense)]
    for kind, block in ((Outer, join_outer(outer)), (Dense, join_dense(dense))):
        same = [use for use in uses if isinstance(use.block, kind)]
        if block is not None:
            joined.append(Captured(block, f"{same[0].operation} × {len(same)}", same[0].rule))
            uses = [use for use in uses if not isinstance(use.block, kind)]
    return *joined, *uses


def join_outer(blocks: Sequence[Outer]) -> Outer | None:
    """Σ of outer products: the positions of all; None for fewer than two."""
    if len(blocks) < 2:
        return None
    return Outer(torch.cat([block.x for block in blocks], dim=1), torch.cat([block.z for block in blocks], dim=1))


def join_dense(blocks: Sequence[Dense]) -> Dense | None:
    """Σ of rows; None for fewer than two blocks."""
    if len(blocks) < 2:
        return None
    return Dense(torch.stack([full_precision(block.values) for block in blocks]).sum(0))


def capture_losses(
    losses: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    provenance: Provenance | None = None,
    plans: Plans | None = None,
    coupled: str = "error",
    check: bool = True,
) -> Capture:
    """Returns the capture of losses that are already there; their graph is kept.

    Without `provenance` nothing tells data from parameters: rows are ∂ℓ_b/∂θ, other samples held fixed.
    """
    losses = check_losses(losses)
    graph = trace(losses)
    key = (signature(graph), coupled, tuple(parameters)) if plans is not None else None
    plan = plans.find(key) if plans is not None else None
    if plan is not None and plan.owners is not None and plan.current():
        uses, known = plan.restore(graph), outputs_by_plan(plan, graph, losses)
        full = False
    else:
        uses, known = find_uses(graph, losses, parameters, coupled, provenance)
        full = True
        if plans is not None:
            plan = make(graph, uses, known, losses.shape[0])
    with torch.no_grad():
        captured = build_uses(uses, known, losses.shape[0])
    result = Capture(losses.detach(), captured, notes=() if plan is None or plan.owners is not None else (PROBED,))
    if check and full:
        check_batch(result, losses, parameters, known)
    if full and plans is not None and plan is not None:
        plans.keep(key, plan)  # only what the check has passed
    elif check and plan is not None and plan.calls % CHECK_EVERY == 0:
        check_use(uses, known, losses.shape[0], plan.calls // CHECK_EVERY)
    return result


def outputs_by_plan(plan: Plan, graph: Graph, losses: Tensor) -> Separation:
    """z at the plan's edges, with the plan's owners: one backward pass."""
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
            block, rule = built[key]
            found.append(Captured(pulled(block, use.route), use.node.name().replace("Backward0", ""), rule))
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
    places = [(name, use) for name, found in uses.items() for use in found]
    if not places:
        return
    name, use = places[turn % len(places)]
    with torch.no_grad():
        site = site_of(use, known, batch)
        # copies: a custom backward may work in place
        whole = call_node(use.node, [None if z is None else z.clone() for z in site.zs])[use.slot]
        expected = None if whole is None else sum_to(whole[None], (1, *site.input_shape))[0]
        check_sum(
            {name: [build(site)[0]]}, {name: expected}, precision=coarsest(*filter_none(site.zs)), backend="outputs"
        )


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
