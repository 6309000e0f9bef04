"""Jacobians by the graph: one forward pass, and one backward pass for each output to the uses of parameters.

    model ─▶ f [B, C] ─▶ Σ_c r_c f_bc, a loss of each sample ─▶ uses and owners, as for any loss (`capture.analysis`)
              └─▶ C passes, of output c of all samples each ─▶ z_c at the uses ─▶ blocks ─▶ one block of B·C rows

What operations have saved is read once and held once (`persample.blocks.kinds.outputs`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from persample.attribution.separation import Separation
from persample.backends.outputs import build_uses, check_batch
from persample.blocks.kinds.outputs import combined, outputs
from persample.capture.analysis import Reading, run
from persample.capture.plans import plans_of
from persample.capture.streaming import Take
from persample.capture.sum_check import distinct_weights
from persample.capture.types import Capture, Captured, Problem
from persample.graph.backward import outputs_of
from persample.graph.nodes import Edge, Node, edge_dtype, edge_shape

SMALL = 2**21
"""Bytes of z up to which all outputs go through the graph at once on a CPU: in larger ones nothing is saved."""
_BATCHED: dict[frozenset[str], bool] = {}
"""Kinds of nodes of a graph -> whether many gradients go through it at once as they do one after the other."""


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
        return (flat * _weights(flat)).sum(1)

    plans = plans_of(problem.model)
    with torch.inference_mode(False), torch.enable_grad():
        reading = run(replace(problem, loss_fn=loss_fn), plans, keep=False)
        found, flat = there[0]
        uses = captured(reading, flat)
        if problem.check and (reading.known is not None or reading.turn is not None):
            check_batch(_of_losses(uses, flat), reading, problem.parameters, problem.coupled, held=True)
        if reading.plan is not None and reading.key is not None:
            plans.keep(reading.key, reading.plan)
    return found.detach(), Capture(flat.detach().flatten(), uses, reading.notes)


def captured(reading: Reading, flat: Tensor) -> dict[str, tuple[Captured, ...]]:
    """Every use of every parameter, with the rows of all outputs."""
    batch = len(flat)
    nodes = list(reading.owners)
    edges = [(node, output) for node in nodes for output in reading.graph.outputs(node)]
    of_output: list[dict[str, tuple[Captured, ...]]] = []
    read: dict[Node, dict[str, Any]] = {}
    zs = _passes(reading, flat, edges)
    silent = {edge for k, edge in enumerate(edges) if all(z[k] is None for z in zs)}
    uses = {
        name: [use for use in places if any((use.node, k) not in silent for k in reading.graph.outputs(use.node))]
        for name, places in reading.uses.items()
    }
    for z in zs:
        given = {
            edge: _zeros(edge, flat) if each is None else each
            for edge, each in zip(edges, z, strict=True)
            if edge not in silent
        }
        z.clear()
        at = {node: tuple(given.get((node, output)) for output in range(outputs_of(node))) for node in nodes}
        with torch.no_grad():
            of_output.append(build_uses(uses, Separation(zs=at, owners=dict(reading.owners)), batch, read))
    return {name: _joined([each.pop(name) for each in of_output]) for name in reading.uses}


def _passes(reading: Reading, flat: Tensor, edges: list[Edge]) -> list[list[Tensor | None]]:
    """z of each output of all samples, at every edge."""
    if not edges:
        return [[] for _ in range(flat.shape[1])]
    small = sum(prod(edge_shape(edge)) * edge_dtype(edge).itemsize for edge in edges) <= SMALL
    kinds = frozenset(node.name() for node in reading.graph.order)
    if (small or not flat.is_cpu) and flat.shape[1] > 2 and _BATCHED.get(kinds, True) and not reading.read_once:
        try:
            found = _batched(flat, edges)
        except RuntimeError:  # no batching rule, or one that refuses: one pass after the other is exact
            _BATCHED[kinds] = False
        else:
            if kinds not in _BATCHED:
                _BATCHED[kinds] = all(_agree(found[c], _backward(flat, edges, c)) for c in (0, flat.shape[1] - 1))
            if _BATCHED[kinds]:
                return found
    return [_backward(flat, edges, c) for c in range(flat.shape[1])]


def _backward(flat: Tensor, edges: list[Edge], output: int) -> list[Tensor | None]:
    cotangent = torch.zeros_like(flat)
    cotangent[:, output] = 1
    at = [GradientEdge(*edge) for edge in edges]
    return list(torch.autograd.grad(flat, at, cotangent, retain_graph=True, allow_unused=True))


def _batched(flat: Tensor, edges: list[Edge]) -> list[list[Tensor | None]]:
    count = flat.shape[1]
    cotangents = torch.eye(count, dtype=flat.dtype, device=flat.device)[:, None].expand(count, *flat.shape)
    at = [GradientEdge(*edge) for edge in edges]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        found = torch.autograd.grad(flat, at, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True)
    return [[None if z is None else z[c] for z in found] for c in range(count)]


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


def _zeros(edge: Edge, like: Tensor) -> Tensor:
    node, output = edge
    return torch.zeros(edge_shape(edge), dtype=edge_dtype(edge), device=node._input_metadata[output].device)


def _joined(found: list[tuple[Captured, ...]]) -> tuple[Captured, ...]:
    with torch.no_grad():
        return tuple(replace(each[0], block=outputs([use.block for use in each])) for each in zip(*found, strict=True))


def _of_losses(uses: Mapping[str, tuple[Captured, ...]], flat: Tensor) -> Callable[[Take], object]:
    """Hands over the rows of Σ_c r_c f_bc, for a check."""
    weights = _weights(flat)[None, :, None].expand(len(flat), -1, 1)

    def hand_over(take: Take) -> None:
        for name, found in uses.items():
            take(name, tuple(replace(use, block=combined(use.block, weights)) for use in found))

    return hand_over


def _weights(flat: Tensor) -> Tensor:
    """r, [C]: all different, for outputs that add up to a constant."""
    return distinct_weights(flat.detach().new_empty(flat.shape[1]))
