"""The check of a rule: the rows of one use against the operation itself, called once for all samples.

A node is linear in z, so with weights w_b given to the entries of z by their owner

    Σ_b w_b g_b = node(w ∘ z)

for the rows g_b of the block. Weights that are all different see what a plain sum does not: rows of two samples mixed
up. Nothing is allowed but the rounding of the sum, relative to its result. Where positions cancel (a convolution's bias
in front of a normalisation, the bias of attention keys: gradients of zero) the result is rounding and says nothing of
the rule. A floor, some part of what was summed, would let wrong rules pass there. Instead the rule is applied again, to
z with random signs, where nothing cancels and every entry is as large as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import hypot, sqrt

import torch
from torch import Tensor

from persample.attribution.owner import Owner
from persample.attribution.separation import Separation
from persample.attribution.uses import Use
from persample.blocks.precision import coarsest, full_precision
from persample.blocks.reductions import weighted_sum
from persample.blocks.types import Block
from persample.capture.sum_check import distinct_weights
from persample.errors import CheckError
from persample.graph.calls import call_node, sum_to
from persample.graph.nodes import edge_dtype
from persample.rules import ALLOWANCES, Site, build

DRAWS = 4
"""Draws of signs, judged together: one alone may happen to cancel in a parameter of few entries."""
UNITS, GROWTH = 8.0, 0.5
"""Rounding allowed, in units of the precision: `UNITS` + `GROWTH` √n for a sum of n terms, one after the other."""
PARTS = 5e-2
"""Rounding allowed where autograd adds the gradients of several uses, a part of their norms."""
LONGEST_HALF = 256.0
"""Terms of a sum, at most, in half precision: of longer ones, added in half precision, rounding leaves too little."""


def check_use(uses: Mapping[str, Sequence[Use]], known: Separation, batch: int, turn: int) -> None:
    """One use, in turn; see `check_site`."""
    places = list({(use.node, use.slot): use for found in uses.values() for use in found}.values())
    if places:
        site = site_of(places[turn % len(places)], known, batch)
        check_site(site, build(site)[0])


@torch.no_grad()
def rounded_away(uses: Sequence[Use], known: Separation, weights: Tensor, gradient: Tensor) -> bool:
    """Whether it is rounding that makes a parameter's rows and its batch gradient two things.

    Where samples, or positions, nearly cancel, little but rounding is left of both. And kernels that add n numbers in
    half precision lose every one that is small beside the sum so far: of the gradient of
    a layer normalisation's weight over 8,000 rows, all of one sign, a fifth is left. So the comparison is made in two
    steps, and what is lost is lost on both sides of the first one:

        gradient of Σ_b w_b ℓ_b  =  Σ_uses route(node(w ∘ z))       no use is missing, each entry has its owner
        node(w ∘ z)              =  Σ_b w_b g_b                     `check_site`, with few enough terms to tell

    Args:
        uses: of the parameter, all of them.
        known: z and owners there.
        weights: w, [B], powers of two, so that w ∘ z is the gradient of Σ_b w_b ℓ_b at the output to the last bit.
        gradient: of Σ_b w_b ℓ_b for the parameter, as autograd gives it.

    Raises:
        CheckError: the rows of a use are not those of its operation.
    """
    total, scale = torch.zeros_like(full_precision(gradient.to_dense())), 0.0
    for use in uses:
        site = site_of(use, known, weights.shape[0])
        whole = _whole(site, weights).to(edge_dtype(use.route.source))
        part = full_precision(use.route.pull(whole[None])[0])
        total, scale = total + part, scale + float(torch.linalg.vector_norm(part))
    if not float(torch.linalg.vector_norm(total - full_precision(gradient.to_dense()))) <= PARTS * scale:
        return False
    for use in uses:
        site = site_of(use, known, weights.shape[0])
        check_site(site, build(site)[0])
    return True


def site_of(use: Use, known: Separation, batch: int) -> Site:
    """The site of a use, of which z and owners are known."""
    return Site(use.node, use.slot, known.zs[use.node], known.owners[use.node], batch)


@torch.no_grad()
def check_site(site: Site, block: Block) -> None:
    """Raises `CheckError` unless the block's rows are those of the site's operation.

    The operation is called once; where its gradient cancels, operation and rule `DRAWS` times more.
    """
    tolerance = rounding(site)
    miss, norm = deviation(site, block)
    if miss <= tolerance * norm:
        return
    signed = [replace(site, zs=zs, shared={}) for zs in with_signs(site)]
    pairs = [deviation(each, build(each)[0]) for each in signed]
    miss, norm = (hypot(*parts) for parts in zip(*pairs, strict=True))
    allowed = tolerance * norm + hypot(*map(ALLOWANCES.get(site.node.name(), lambda _: 0.0), signed))
    if not miss <= allowed:
        raise CheckError(
            f"the rule for {site.node.name()} gives rows that do not add up to what the operation itself gives (norm "
            f"of the difference {miss:.3g}, of the gradient {norm:.3g}; rounding explains {allowed:.1g}): the "
            "result would be wrong. Correct the rule if it is your own, or report the model; check=False turns this "
            "check off, backend='vmap' may cover the model"
        )


def deviation(site: Site, block: Block) -> tuple[float, float]:
    """Norms of Σ_b w_b g_b − node(w ∘ z) and of node(w ∘ z), as far as a sample that is not finite leaves them so."""
    present = next(z for z in site.zs if z is not None)
    # rounded to the precision of z, so that both sides have the same weights
    weights = distinct_weights(present.new_empty(site.batch, dtype=present.dtype.to_real()))
    rows = weighted_sum(block, weights.to(block.dtype.to_real()))
    expected = _whole(site, weights)
    if not bool(expected.isfinite().all()):
        finite = expected.isfinite() & rows.isfinite()
        rows, expected = torch.where(finite, rows, 0), torch.where(finite, expected, 0)
    return float(torch.linalg.vector_norm(rows - expected)), float(torch.linalg.vector_norm(expected))


def _whole(site: Site, weights: Tensor) -> Tensor:
    """node(w ∘ z): the operation called once for all samples, [*input], in float32 or better."""
    weighted = [
        None if z is None or owner is None else weigh(z, owner, weights)
        for z, owner in zip(site.zs, site.owners, strict=True)
    ]
    whole = call_node(site.node, weighted)[site.slot]
    if whole is None:
        return full_precision(next(z for z in site.zs if z is not None).new_zeros(site.input_shape))
    return sum_to(full_precision(whole.to_dense())[None], (1, *site.input_shape))[0]


def weigh(z: Tensor, owner: Owner, weights: Tensor) -> Tensor:
    """z with each entry multiplied by its owner's weight."""
    if not len(weights):
        return z  # of an empty batch: zeros, for nobody's losses
    each = weights.to(z.dtype.to_real())[owner.ids.clamp(min=0)]  # entries of nobody are zero
    return z * (each if owner.axis is None else each.view([-1 if d == owner.axis else 1 for d in range(z.ndim)]))


def with_signs(site: Site) -> list[tuple[Tensor | None, ...]]:
    """z with random signs, `DRAWS` times; the same ones every time, and the user's random numbers are left alone.

    In half precision some of z is left out where the sum is of more than `LONGEST_HALF` terms.
    """
    generator = torch.Generator().manual_seed(0)
    kept = min(1.0, longest(site) / terms(site))

    def draw(z: Tensor | None) -> Tensor | None:
        if z is None:
            return None
        signs = 2 * torch.randint(2, z.shape, generator=generator, dtype=torch.int8) - 1
        if kept < 1:
            signs *= torch.rand(z.shape, generator=generator) < kept
        return z * signs.to(z.device)

    return [tuple(draw(z) for z in site.zs) for _ in range(DRAWS)]


def rounding(site: Site) -> float:
    """Largest ‖difference‖/‖gradient‖ that rounding explains, where nothing cancels.

    Kernels add n terms in some order, at worst one after the other: n terms of random sign, of size t, have a sum of
    √n t, and rounding errors of eps √k t each, √(Σ_k k) eps t = √(n/2) √n eps t together.
    """
    precision, device = _precision(site)
    return torch.finfo(precision).eps * (UNITS + GROWTH * sqrt(longest(site))) + _lowered(precision, device)


def longest(site: Site) -> float:
    """Terms of the longest sum that rounding is allowed for."""
    half = torch.finfo(_precision(site)[0]).bits < 32
    return min(terms(site), LONGEST_HALF) if half else terms(site)


def terms(site: Site) -> float:
    """Terms n that one entry of the gradient sums: z, but for the axis along which the parameter has entries."""
    found = 1.0
    for z, owner in zip(site.zs, site.owners, strict=True):
        if z is not None and owner is not None:
            own = [size for axis, size in enumerate(z.shape) if axis != owner.axis and size in site.input_shape]
            found = max(found, z.numel() / max(own, default=1))
    return found


def _precision(site: Site) -> tuple[torch.dtype, torch.device]:
    zs = [z for z in site.zs if z is not None]
    return coarsest(*zs), zs[0].device


def _lowered(precision: torch.dtype, device: torch.device) -> float:
    """Rounding of the factors of a product of float32: accelerators take TF32 for convolutions, by default."""
    if precision not in (torch.float32, torch.complex64):
        return 0.0
    try:
        allowed = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by backend, which this function refuses to sum up
        allowed = "medium"
    return {"highest": 0.0 if device.type == "cpu" else 2.0**-10, "high": 2.0**-10}.get(allowed, 2.0**-7)
