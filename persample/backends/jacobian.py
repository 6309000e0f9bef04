"""Jacobians by the graph: one forward pass, and one backward pass for each output to the uses of parameters.

    model ─▶ f [B, C] ─▶ Σ_c r_c f_bc, a loss of each sample ─▶ uses and owners, as for any loss (`capture.analysis`)
              └─▶ C passes, of output c of all samples each ─▶ z_c at the uses ─▶ blocks ─▶ one block of B·C rows

What operations have saved is read once and held once (`persample.blocks.kinds.outputs`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from persample.attribution.separation import Separation
from persample.backends.outputs import build_uses, check_batch
from persample.blocks.chunking import CHUNK_BYTES
from persample.blocks.kinds.outputs import combined, outputs
from persample.blocks.reductions import materialise
from persample.blocks.types import Block, Dense, Outer, Outputs
from persample.capture.analysis import Reading, run
from persample.capture.assemble import capture_use
from persample.capture.plans import plans_of
from persample.capture.streaming import Take
from persample.capture.sum_check import distinct_weights
from persample.capture.types import Capture, Captured, Problem
from persample.graph.backward import outputs_of
from persample.graph.nodes import Edge, Graph, Node, edge_dtype, edge_shape
from persample.rules import Site
from persample.rules.outputs import build_together

SMALL = 2**21
"""Bytes of z up to which all outputs go through the graph at once on a CPU: in larger ones nothing is saved."""
CROWDED = 2
"""Positions for an entry of the input, from which on rows are held in place of factors."""
_BATCHED: dict[frozenset[str], bool] = {}
"""Kinds of nodes of a graph -> whether many gradients go through it at once as they do one after the other."""

Many = Sequence[Tensor | None] | Tensor
"""A gradient for each of some outputs; one tensor where they came at once."""


def capture_jacobian(problem: Problem, chosen: Callable[[Any], Tensor]) -> tuple[Tensor, Capture]:
    """Returns the outputs, [B, *out], and the capture of B·C rows ∂f_bc/∂θ, with C their number for a sample.

    Args:
        problem: its loss function is not looked at.
        chosen: from what the model returns to the outputs, [B, *out]; raises what is wrong with them.
    """
    there: list[tuple[Tensor, Tensor]] = []

    def loss_fn(returned: Any, _: Any) -> Tensor:
        found = chosen(returned)
        # an operation of its own, so that a parameter that is itself an output is met below
        flat = found.reshape(len(found), prod(found.shape[1:])) * 1.0
        there[:] = [(found, flat)]  # the last run counts
        return (flat * different(flat)).sum(1)

    plans = plans_of(problem.model)
    with torch.inference_mode(False), torch.enable_grad():
        reading = run(replace(problem, loss_fn=loss_fn), plans, keep=False)
        found, flat = there[0]
        uses = captured(reading, flat)
        if problem.check and (reading.known is not None or reading.turn is not None):
            check_batch(of_losses(uses, flat), reading, problem.parameters, problem.coupled, held=True)
        if reading.plan is not None and reading.key is not None:
            plans.keep(reading.key, reading.plan)
    return found.detach(), Capture(flat.detach().flatten(), uses, reading.notes)


def captured(reading: Reading, flat: Tensor) -> dict[str, tuple[Captured, ...]]:
    """Every use of every parameter, with the rows of all outputs."""
    edges = [
        (node, output) for node, owners in reading.owners.items() for output, o in enumerate(owners) if o is not None
    ]
    silent = set(edges)
    of_output: list[dict[str, tuple[Captured, ...]]] = []
    found: dict[str, tuple[Captured, ...]] = {}
    read: dict[Node, dict[str, Any]] = {}  # of one batch
    for part in passes(reading.graph, flat, edges, once=reading.read_once):
        zs = dict(zip(edges, part, strict=True))
        silent -= {edge for edge, many in zs.items() if any(z is not None for z in many)}
        if all(isinstance(many, Tensor) and len(many) == flat.shape[1] for many in part):
            found = _together(reading, zs, len(flat), read)
        left = {name: places for name, places in reading.uses.items() if name not in found}
        for c in range(len(part[0]) if part and left else 0):
            z = {edge: _zeros(edge) if many[c] is None else many[c] for edge, many in zs.items()}
            at = {node: tuple(z.get((node, k)) for k in range(outputs_of(node))) for node in reading.owners}
            known = Separation(zs=at, owners=dict(reading.owners))
            with torch.no_grad():
                built = build_uses(left, known, len(flat), read)
                of_output.append({name: tuple(map(_smaller, uses)) for name, uses in built.items()})
    quiet = {
        node
        for node, owners in reading.owners.items()
        if all(o is None or (node, k) in silent for k, o in enumerate(owners))
    }
    there = {name for name, places in reading.uses.items() if any(use.node not in quiet for use in places)}
    joined = {name: _joined([each.pop(name) for each in of_output]) for name in there if name not in found}
    return {name: found.get(name) or joined.get(name, ()) for name in reading.uses}


def _together(
    reading: Reading, zs: Mapping[Edge, Many], batch: int, read: dict[Node, dict[str, Any]]
) -> dict[str, tuple[Captured, ...]]:
    """The uses that one rule builds of all outputs, of parameters with one use."""
    found: dict[str, tuple[Captured, ...]] = {}
    with torch.no_grad():
        for name, places in reading.uses.items():
            many = zs.get((places[0].node, 0)) if len(places) == 1 else None
            if isinstance(many, Tensor):
                use = places[0]
                site = Site(use.node, use.slot, (), reading.owners[use.node], batch, read=read.setdefault(use.node, {}))
                built = build_together(site, many)
                if built is not None and not crowded(built[0]):
                    found[name] = (capture_use(use, *built),)
    return found


def _smaller(use: Captured) -> Captured:
    """A use with its rows in place of factors, where these are larger by far."""
    return replace(use, block=Dense(materialise(use.block))) if crowded(use.block) else use


def crowded(block: Block) -> bool:
    """Whether there are many positions, and few entries."""
    if isinstance(block, Outputs) and block.spec is None:
        return block.x.shape[1] >= CROWDED * block.x.shape[2]
    return isinstance(block, Outer) and block.z.shape[1] >= CROWDED * max(block.x.shape[2], block.z.shape[2])


def passes(graph: Graph, flat: Tensor, edges: list[Edge], *, once: bool = False) -> Iterator[list[Many]]:
    """The gradients of each output of all samples: some outputs at a time, at every edge one gradient for each.

    Args:
        graph: that the edges are in.
        flat: the outputs, [B, C].
        edges: where gradients are wanted.
        once: whether what operations have saved can be read once only.
    """
    count = flat.shape[1]
    small = sum(_bytes(edge) for edge in edges) <= SMALL
    kinds = frozenset(node.name() for node in graph.order)
    start = 0
    if edges and (small or not flat.is_cpu) and count > 2 and _BATCHED.get(kinds, True) and not once:
        all_of_it = sum(_bytes((node, k)) for node in graph.order for k in graph.outputs(node))
        step = max(2, CHUNK_BYTES // max(1, all_of_it))
        while start < count and _BATCHED.get(kinds, True):
            chunk = range(start, min(count, start + step))
            try:
                found = _batched(flat, edges, chunk)
            except RuntimeError:  # no batching rule, or one that refuses: one pass after the other is exact
                _BATCHED[kinds] = False
                break
            if kinds not in _BATCHED:
                alone = [(c, _backward(flat, edges, chunk[c])) for c in (0, len(chunk) - 1)]
                _BATCHED[kinds] = all(_agree([None if z is None else z[c] for z in found], z) for c, z in alone)
            if _BATCHED[kinds]:
                yield [[None] * len(chunk) if z is None else z for z in found]
                start = chunk.stop
    for c in range(start, count):
        yield [[z] for z in _backward(flat, edges, c)]


def _backward(flat: Tensor, edges: list[Edge], output: int) -> list[Tensor | None]:
    if not edges:
        return []
    cotangent = torch.zeros_like(flat)
    cotangent[:, output] = 1
    at = [GradientEdge(*edge) for edge in edges]
    return list(torch.autograd.grad(flat, at, cotangent, retain_graph=True, allow_unused=True))


def _batched(flat: Tensor, edges: list[Edge], chunk: range) -> list[Tensor | None]:
    rows = torch.zeros(len(chunk), flat.shape[1], dtype=flat.dtype, device=flat.device)
    rows[:, chunk.start : chunk.stop].fill_diagonal_(1)
    at = [GradientEdge(*edge) for edge in edges]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        return list(
            torch.autograd.grad(
                flat, at, rows[:, None].expand(-1, *flat.shape),
                retain_graph=True, allow_unused=True, is_grads_batched=True,
            )
        )  # fmt: skip


def _bytes(edge: Edge) -> int:
    return prod(edge_shape(edge)) * edge_dtype(edge).itemsize


def _agree(batched: list[Tensor | None], alone: list[Tensor | None]) -> bool:
    """Whether torch's rules for many gradients at once give what one pass does; a batch that is not finite tells no."""
    for many, one in zip(batched, alone, strict=True):
        if many is None or one is None:
            if one is not many and not all(each is None or not bool(each.any()) for each in (many, one)):
                return False
            continue
        allowed = torch.finfo(one.dtype).eps ** 0.5 * float(torch.linalg.vector_norm(one))
        if not float(torch.linalg.vector_norm(many - one)) <= allowed:
            return False
    return True


def _zeros(edge: Edge) -> Tensor:
    node, output = edge
    return torch.zeros(edge_shape(edge), dtype=edge_dtype(edge), device=node._input_metadata[output].device)


def _joined(found: list[tuple[Captured, ...]]) -> tuple[Captured, ...]:
    with torch.no_grad():
        return tuple(replace(each[0], block=outputs([use.block for use in each])) for each in zip(*found, strict=True))


def of_losses(uses: Mapping[str, tuple[Captured, ...]], flat: Tensor) -> Callable[[Take], object]:
    """Hands over the rows of Σ_c r_c f_bc, for a check."""
    weights = different(flat)[None, :, None].expand(len(flat), -1, 1)

    def hand_over(take: Take) -> None:
        for name, found in uses.items():
            take(name, tuple(replace(use, block=combined(use.block, weights)) for use in found))

    return hand_over


def different(flat: Tensor) -> Tensor:
    """r, [C]: all different, for outputs that add up to a constant."""
    return distinct_weights(flat.detach().new_empty(flat.shape[1]))
