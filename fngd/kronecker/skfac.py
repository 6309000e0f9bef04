"""SKFAC: KFAC's factors inverted through the batch, for which matrices of the size of the batch suffice.

    symbol   meaning                                                               shape
    N, T     samples, positions in a sample                                        (see `statistics`)
    Ā        x_bt/√N as columns, so that A = ĀĀᵀ is KFAC's                         [inp, R]
    Ḡ        (N z_bt)/√R as columns, so that G = ḠḠᵀ is KFAC's                     [out, R]
    γ'       √γ, the damping of either factor
    R        columns: N for a layer with one position; N·T, N or N·T' for several

    (A + γ'I)⁻¹ = (1/γ')[I − Ā(ĀᵀĀ + γ'I_R)⁻¹Āᵀ],    likewise G;    v = (G + γ'I)⁻¹ g (A + γ'I)⁻¹

(Tang et al., CVPR 2021). The columns are kept as rows, [groups, R, features]. Positions of a linear layer are all
kept, which is exact; where R reaches the number of features, the features' own matrix is inverted instead, to the
same result at less cost. For the T positions of a convolution there are three reductions:

    "sum"        (Reduce Sum)            Ā = Σ_t x_bt/√N,  Ḡ = √N Σ_t z_bt:  the positions added, then as for T = 1
    "mean"       (public code)           the same with 1/T Σ_t
    "subsample"  (Spatial Subsampling)   T' positions, drawn anew for each statistics, the same ones for all samples:
                 Ā = √(T/T')·x_bt/√N,  Ḡ = N z_bt/√(N·T'):  on average over the draws KFAC's A and G, and
                 just these for T' = T
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from fngd.kronecker.base import LayerPreconditioned
from fngd.kronecker.kfac import damped_inverse, on_device
from fngd.kronecker.method import Method, State
from fngd.kronecker.options import LayerOptions
from fngd.kronecker.processes import Found, Ranks, joined_rows
from fngd.kronecker.statistics import (
    Factors,
    Statistics,
    all_positions,
    own_scale,
    position_count,
    sample_count,
    some_positions,
    summed_positions,
)
from fngd.optim.checks import showing
from fngd.optim.presets import with_presets

POSITIONS = ("sum", "mean", "subsample")
PRESETS: dict[str | None, dict[str, Any]] = {None: {}, "skfac": {"positions": "mean", "damping": 0.03, "kl_clip": None}}

Rows = Float[Tensor, "groups rows features"]


def solve_rows(rows: Rows, damping: float | Tensor) -> Rows:
    """Returns (ĀᵀĀ + γ'I_R)⁻¹ Āᵀ, by Cholesky in float64; `rows` is Āᵀ."""
    wide = rows.double()
    return (damped_inverse(wide @ wide.mT, damping) @ wide).to(rows.dtype)


def low_rank_product(
    matrix: Float[Tensor, "groups other features"], rows: Rows, solved: Rows, damping: float | Tensor
) -> Float[Tensor, "groups other features"]:
    """Returns M (ĀĀᵀ + γ'I)⁻¹ without forming anything of size features × features.

        M (ĀĀᵀ + γ'I)⁻¹ = (1/γ')[M − (M Ā)(ĀᵀĀ + γ'I_R)⁻¹Āᵀ]    (Tang et al. 2021)

    Arguments:
        rows: Āᵀ; rows of zeros change nothing.
        solved: `solve_rows(rows, damping)`.
        damping: γ' > 0.

    >>> rows = torch.tensor([[[1.0, 0.0]]])
    >>> low_rank_product(torch.ones(1, 1, 2), rows, solve_rows(rows, 1.0), 1.0)
    tensor([[[0.5000, 1.0000]]])
    """
    return (matrix - (matrix @ rows.mT) @ solved) / damping


def compact(rows: Rows) -> Tensor:
    """Returns the rows, or their second moment [groups, features, features] where that is not larger."""
    return rows if rows.shape[1] < rows.shape[2] else rows.mT @ rows


def merged(sides: Sequence[Tensor]) -> Tensor:
    """Returns what `compact` makes of all rows together; each side is as `compact` has left it."""
    if any(_is_moment(side) for side in sides):
        first, *rest = (_moment(side) for side in sides)
        return sum(rest, first)
    return sides[0] if len(sides) == 1 else compact(torch.cat(list(sides), 1))


def scaled(side: Tensor, factor: float) -> Tensor:
    """Returns the side of rows times `factor`."""
    return side * (factor**2 if _is_moment(side) else factor)


def replaced(old: Tensor | None, new: Tensor, good: Tensor) -> Tensor:
    """Returns `new` where `good` is True, else `old` (None: zeros); both as `compact` leaves them.

    Rows are filled up with zeros to the longer of the two, as both results must have one shape.
    """
    if old is None:
        return torch.where(good, new, 0.0)
    if _is_moment(old) != _is_moment(new):
        old, new = _moment(old), _moment(new)
    longest = max(old.shape[1], new.shape[1])
    old, new = (F.pad(side, (0, 0, 0, longest - side.shape[1])) for side in (old, new))
    return torch.where(good, new, old)


def _is_moment(side: Tensor) -> bool:
    return side.shape[1] == side.shape[2]


def _moment(side: Tensor) -> Tensor:
    return side if _is_moment(side) else side.mT @ side


@dataclass(frozen=True)
class LowRankFactors(Method):
    """SKFAC's part of a step; see `fngd.kronecker.method.Method`."""

    positions: str
    keep: int

    def collect(self, factors: Factors, *, bias: bool, convolution: bool, random: torch.Generator) -> Statistics:
        """Returns x and z as `compact` leaves them; `rows` of the result divides the sum that is G."""
        samples, times = sample_count(factors), position_count(factors)
        rows = samples * times
        if not convolution or times == 1:
            x, z = (each.flatten(1, 2) for each in all_positions(factors, bias=bias))
        elif self.positions == "subsample":
            kept = min(self.keep, times)
            index = sorted(torch.randperm(times, generator=random)[:kept].tolist())
            x, z = (each.flatten(1, 2) for each in some_positions(factors, index, bias=bias))
            x, rows = x * (times / kept) ** 0.5, samples * kept
        else:
            x, z = summed_positions(factors, bias=bias)
            rows = samples
            if self.positions == "mean":
                x, z = x / times, z / times
        return Statistics(compact(x), compact(z), samples, rows, convolution)

    def combine(self, first: Statistics, second: Statistics) -> Statistics:
        """Returns the rows of both batches."""
        return Statistics(
            merged([first.inputs, second.inputs]),
            merged([first.outputs, second.outputs]),
            first.samples + second.samples,
            first.rows + second.rows,
            first.convolution,
        )

    def joined(self, found: Found, ranks: Ranks) -> dict[str, Statistics]:
        """Returns the rows of all processes."""
        return joined_rows(found, ranks, merged)

    def update(self, old: State | None, new: Statistics, reduction: str) -> State:
        """Returns Āᵀ ("inputs") and Ḡᵀ ("outputs") of this batch alone."""
        good = new.finite()
        count = torch.zeros((), dtype=torch.long, device=good.device) if old is None else old["count"]
        a = scaled(new.inputs, new.samples**-0.5)
        g = scaled(new.outputs, own_scale(reduction, new.samples) / new.rows**0.5)
        return {
            "inputs": replaced(None if old is None else old["inputs"], a, good),
            "outputs": replaced(None if old is None else old["outputs"], g, good),
            "count": count + good,
        }

    def invert(self, running: State, damping: float, before: State | None) -> State:
        """Returns each side with what the solve leaves: an inverse, or rows and solved rows."""
        result, root = {}, damping**0.5
        for name in ("inputs", "outputs"):
            side = running[name]
            if _is_moment(side):
                result[f"inverse_{name}"] = damped_inverse(side, root)
            else:
                result |= {f"rows_{name}": side, f"solved_{name}": solve_rows(side, root)}
        # what was solved with, as the group's may be scheduled
        return result | {"damping": on_device(root, running["inputs"])}

    def direction(self, inverse: State, grad: Float[Tensor, "groups out inp"], damping: float) -> Tensor:
        """Returns v = (G + γ'I)⁻¹ g (A + γ'I)⁻¹."""
        return _divide(_divide(grad, inverse, "inputs").mT, inverse, "outputs").mT


def _divide(matrix: Tensor, inverse: State, name: str) -> Tensor:
    if f"inverse_{name}" in inverse:
        return matrix @ inverse[f"inverse_{name}"]
    return low_rank_product(matrix, inverse[f"rows_{name}"], inverse[f"solved_{name}"], inverse["damping"])


class SKFAC(LayerPreconditioned):
    """Swift KFAC, with inverses of the size of the batch; a `torch.optim.Optimizer` for the ordinary loop.

        v = (G + γ'I)⁻¹ g (A + γ'I)⁻¹,    (A + γ'I)⁻¹ = (1/γ')[I − Ā(ĀᵀĀ + γ'I)⁻¹Āᵀ],    γ' = √γ

    for every linear and (not transposed) convolution layer, weight and bias together (Tang et al., CVPR 2021;
    symbols: `fngd.kronecker.skfac`), from one batch, without moving averages. The other parameters get the plain
        gradient.

    Arguments:
        damping: γ > 0; the paper's .03·.87^(epoch/10) can be scheduled in `param_groups[i]["damping"]`.
        positions: what becomes of a convolution's positions: "sum" (Reduce Sum), "mean" (the same with means,
            as in public code) or "subsample" (Spatial Subsampling).
        keep: positions T' ≥ 1 that subsampling keeps.
        seed: of the subsampling.
        every: steps between new factors and inverses, ≥ 1.
        preset: "skfac" for the public code's positions="mean", damping=.03 and no KL clip, where none are given.
        Others: as for `KFAC`.

    Raises:
        ValueError: an argument out of range, or a model that is reweighted already.

    Approximate: as `KFAC`, with each factor damped on its own; exact like it for linear layers, while the
    reductions of a convolution's positions are approximations of their own. A batch with inf or NaN leaves the
    factors as they were.

    >>> model = nn.Linear(3, 1)
    >>> opt = SKFAC(model, lr=0.1)
    >>> model(torch.randn(2, 3)).square().mean().backward()
    >>> opt.step()
    >>> opt.zero_grad()
    """

    @showing(LayerPreconditioned.__init__)
    @with_presets(PRESETS)
    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        positions: str = "sum",
        keep: int = 4,
        seed: int = 0,
        every: int = 1,
        preset: str | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        if positions not in POSITIONS:
            raise ValueError(f"positions={positions!r} is unknown; choose one of {list(POSITIONS)}")
        super().__init__(model, params, LowRankFactors(positions, keep), every, every, seed, **options)
