"""HyLo: natural gradient from a few samples of the batch, which stand for all of it.

    symbol   meaning                                                                    shape
    U        gradients of the N samples' own losses, of one layer, as columns           [parameters, N]
    K        UᵀU                                                                        [N, N]
    S        the r samples that are kept; U_S their columns, as x and z of every position
    W        what they stand for: UUᵀ ≈ U_S W U_Sᵀ                                      [r, r]
    g, v, γ  the layer's gradient, direction, damping

    v = (γI + U_S W U_Sᵀ/N)⁻¹ g = (1/γ)[g − U_S M U_Sᵀ g],    M = L (γI + LᵀK_SS L)⁻¹ Lᵀ,    LLᵀ = W/N

(Mu, Soori, Can, Gürbüzbalaban, Mehri Dehnavi: HyLo, SC 2022.) S and W are found in one of two ways:

    "interpolate"  (KID)  S by pivoted Cholesky of K, greedily the sample that the others explain least; U ≈ U_S Pᵀ
                   with P = K_:S K_SS⁻¹, so W = PᵀP: an interpolative decomposition of the Khatri–Rao product U
    "sample"       (KIS)  r draws with probabilities p_b ∝ ‖g_b‖²; W = diag(1/(r p_b)), so that U_S W U_Sᵀ is UUᵀ on
                   average over the draws

KID is dearer and better, and is used where the gradient changes much: "switch" compares the length of the gradient that
an epoch has added up with that of the epoch before, as the paper does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from fngd.kronecker.base import LayerPreconditioned
from fngd.kronecker.hylo.regime import KEEPING, Regime, check_regime
from fngd.kronecker.kfac import damped_inverse, on_device, symmetric_eigen
from fngd.kronecker.method import Method, State
from fngd.kronecker.options import LayerOptions
from fngd.kronecker.processes import Found, Ranks
from fngd.kronecker.statistics import Factors, Kept, Statistics, all_positions, own_scale, position_count, sample_count
from fngd.optim.checks import showing

SELECTIONS = ("switch", *KEEPING)
CHUNK = 2**22
"""Numbers of per-sample gradients that are formed at a time."""


def sample_gram(x: Float[Tensor, "groups n time inp"], z: Float[Tensor, "groups n time out"]) -> Float[Tensor, "n n"]:
    """Returns K = UᵀU of g_b = Σ_t z_bt x_btᵀ, all groups together, in float64; some outputs at a time.

    >>> sample_gram(torch.ones(1, 2, 1, 3), torch.tensor([[[[1.0]], [[2.0]]]]))
    tensor([[ 3.,  6.],
            [ 6., 12.]], dtype=torch.float64)
    """
    if x.shape[2] == 1:
        x, z = x.squeeze(2).double(), z.squeeze(2).double()
        return ((x @ x.mT) * (z @ z.mT)).sum(0)
    result = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in z.split(max(1, CHUNK // max(1, x[..., 0, :].numel())), 3):
        gradients = (part.mT @ x).transpose(0, 1).flatten(1).double()
        result += gradients @ gradients.mT
    return result


def pivots(gram: Float[Tensor, "n n"], count: int) -> Int[Tensor, " count"]:
    """Returns samples by pivoted Cholesky: again and again the one whose gradient is farthest from the others' span.

    >>> pivots(torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0], [2.0, 0.0, 4.0]]), 2)
    tensor([2, 1])
    """
    left, columns, chosen = gram.diagonal().clone(), gram.new_zeros(len(gram), count), []
    for k in range(count):
        pivot = left.argmax().view(1)
        chosen.append(pivot)
        column = gram.index_select(1, pivot) - columns @ columns.index_select(0, pivot).mT
        length = left.index_select(0, pivot)
        columns[:, k : k + 1] = torch.where(length > 0, column / length.clamp_min(1e-300).sqrt(), 0.0)
        left = (left - columns[:, k].square()).index_fill(0, pivot, -1.0)
    return torch.cat(chosen)


def interpolated(gram: Float[Tensor, "n n"], chosen: Int[Tensor, " r"]) -> Float[Tensor, "r r"]:
    """Returns L with LLᵀ = PᵀP, P = K_:S K_SS⁺ (KID)."""
    columns = gram.index_select(1, chosen)
    share = columns @ torch.linalg.pinv(columns.index_select(0, chosen), rtol=1e-12, hermitian=True)
    values, vectors = symmetric_eigen(share.mT @ share)
    return vectors * values.sqrt()


@dataclass(frozen=True)
class KeptSamples(Method):
    """HyLo's part of a step; see `fngd.kronecker.method.Method`. `select`: "interpolate" or "sample"."""

    rank: float
    select: str

    def collect(self, factors: Factors, *, bias: bool, convolution: bool, random: torch.Generator) -> Statistics:
        """Returns x and z of the samples that are kept, [groups, r, time, features], and L."""
        samples, kept = sample_count(factors), Kept(factors, bias)
        count = min(samples, max(1, round(self.rank * samples)))
        if self.select == "sample":  # the diagonal suffices
            squares = torch.cat([(z.mT @ x).square().sum((0, 2, 3)) for x, z in kept.chunks(CHUNK)]).double()
            chances = torch.where(squares.isfinite(), squares, 0.0).cpu()
            chances = torch.ones_like(chances) if not chances.any() else chances
            chosen = torch.multinomial(chances, count, replacement=True, generator=random).to(squares.device)
            weights = (chances.sum() / (count * chances)).sqrt().to(squares)[chosen].diag()
        else:
            gram = sample_gram(*all_positions(factors, bias=bias))
            gram = torch.where(gram.isfinite().all(), gram, torch.eye(samples).to(gram))
            chosen = pivots(gram, count)
            weights = interpolated(gram, chosen)
        x, z = all_positions([(x[chosen], z[chosen]) for x, z in factors], bias=bias)
        rows = samples * position_count(factors)
        return Statistics(x, z, samples, rows, convolution, weights=weights.to(z))

    def combine(self, first: Statistics, second: Statistics) -> Statistics:
        """Returns the samples of both batches."""
        return _united([first, second])

    def joined(self, found: Found, ranks: Ranks) -> dict[str, Statistics]:
        """Returns the samples that all processes have kept, each of its own."""
        own = {layer: _plain(each) for layer, each in found.items()}
        ranks.exchange.bytes_sent += sum(each.inputs.nbytes + each.outputs.nbytes for each in own.values())
        everyone: list[Found] = ranks.exchange.everyone_says(own)
        result = {}
        for layer in ranks.layers:
            there = [each[layer] for each in everyone if layer in each]
            if there:
                total = sum(each.samples for each in there)
                shares = [each.samples / total if ranks.mean else 1.0 for each in there]
                scaled = [replace(e, outputs=e.outputs * share) for e, share in zip(there, shares, strict=True)]
                result[layer] = _moved(_united(scaled), ranks.device)
        return result

    def update(self, old: State | None, new: Statistics, reduction: str) -> State:
        """Returns x ("inputs"), z ("outputs") of own losses, and L ("weights"), of this batch alone."""
        good = new.finite()
        assert new.weights is not None, "collect has set it"
        parts = {
            "inputs": new.inputs,
            "outputs": new.outputs * own_scale(reduction, new.samples),
            "weights": new.weights * new.samples**-0.5,
        }
        if old is None:
            zero = torch.zeros((), dtype=torch.long, device=good.device)
            return {name: torch.where(good, part, 0.0) for name, part in parts.items()} | {"count": zero + good}
        result = {"count": old["count"] + good}
        for name, part in parts.items():
            new_part, old_part = _same_shape(part, old[name])
            result[name] = torch.where(good, new_part, old_part)
        return result

    def invert(self, running: State, damping: float, before: State | None) -> State:
        """Returns the kept samples with M."""
        x, z, root = running["inputs"], running["outputs"], running["weights"].double()
        inner = root.mT @ sample_gram(x, z) @ root
        kernel = root @ damped_inverse(inner.unsqueeze(0), damping)[0] @ root.mT
        return {"inputs": x, "outputs": z, "kernel": kernel.to(x), "damping": on_device(damping, x)}

    def direction(self, inverse: State, grad: Float[Tensor, "groups out inp"], damping: float) -> Tensor:
        """Returns v, with the damping that M was made with."""
        x, z = inverse["inputs"], inverse["outputs"]
        inner = ((x @ grad.mT.unsqueeze(1)) * z).sum((0, 2, 3))
        weighted = z * (inverse["kernel"] @ inner).view(1, -1, 1, 1)
        return (grad - weighted.flatten(1, 2).mT @ x.flatten(1, 2)) / inverse["damping"]


def _united(each: Sequence[Statistics]) -> Statistics:
    """The samples of several batches; shorter ones get positions of zeros."""
    time = max(part.inputs.shape[2] for part in each)
    inputs, outputs = (
        torch.cat([F.pad(side, (0, 0, 0, time - side.shape[2])) for side in sides], 1)
        for sides in ([part.inputs for part in each], [part.outputs for part in each])
    )
    weights = torch.block_diag(*[part.weights for part in each if part.weights is not None])
    samples, rows = sum(part.samples for part in each), sum(part.rows for part in each)
    return Statistics(inputs, outputs, samples, rows, each[0].convolution, weights=weights)


def _same_shape(*tensors: Tensor) -> list[Tensor]:
    """All with zeros up to the longest along each axis: samples and positions that weigh nothing."""
    sizes = [max(lengths) for lengths in zip(*(tensor.shape for tensor in tensors), strict=True)]
    return [
        F.pad(tensor, [n for size, own in zip(sizes[::-1], tensor.shape[::-1], strict=True) for n in (0, size - own)])
        for tensor in tensors
    ]


def _plain(each: Statistics) -> Statistics:
    """On the CPU, without views of larger tensors: it is sent."""
    own = replace(each, inputs=each.inputs.clone(), outputs=each.outputs.clone())
    return _moved(own, torch.device("cpu"))


def _moved(each: Statistics, device: torch.device) -> Statistics:
    weights = None if each.weights is None else each.weights.to(device)
    return replace(each, inputs=each.inputs.to(device), outputs=each.outputs.to(device), weights=weights)


class HyLo(LayerPreconditioned):
    """Hybrid low-rank natural gradient; a `torch.optim.Optimizer` for the ordinary training loop.

        v = (γI + U_S W U_Sᵀ/N)⁻¹ g,    θ ← SGD(θ, ν·v)    (Mu et al., SC 2022)

    for every linear and (not transposed) convolution layer, weight and bias together (symbols:
    `fngd.kronecker.hylo.hylo`); ν is the KL clip of `KFAC`. The other parameters get the plain gradient. Per-sample
    gradients are exact, sums over positions included; with rank=1.0 and "interpolate" it is natural gradient by the
    samples of one batch.

    Arguments:
        damping: γ > 0, in the units of a squared gradient of a sample's own loss.
        rank: share of a backward pass's samples that are kept, r = max(1, rank·N), 0 < rank ≤ 1.
        select: "interpolate" (KID), "sample" (KIS), or "switch": KID in the first epoch and in those that follow one
            whose gradient changed, KIS in the others.
        threshold: with "switch", the gradient has changed where |‖Σg‖ − ‖Σg‖'| / ‖Σg‖' is at least this, of the
            gradients added up over an epoch and over the one before, or where a learning rate was halved, or more.
        steps_per_epoch: optimiser steps (batches) in an epoch; with "switch" it has to be given.
        every: steps between selections, ≥ 1.
        seed: of the draws.
        Others: as for `KFAC`.

    Raises:
        ValueError: an argument out of range, or a model that is reweighted already.

    Approximate: the empirical Fisher matrix of one batch, block-diagonal by layer, of a few of its samples. With
    gradient accumulation and several processes each pass and process selects among its own; what is kept travels as
    pickled tensors. The public code has what interpolation leaves over in M, but nowhere else; here UUᵀ is approximated
    once.
    "switch" waits for the device once an epoch, and keeps one more gradient. A batch with inf or NaN leaves the
    samples as they were.

    >>> model = nn.Linear(3, 1)
    >>> opt = HyLo(model, lr=0.1, select="interpolate")
    >>> model(torch.randn(8, 3)).square().mean().backward()
    >>> opt.step()
    >>> opt.zero_grad()
    """

    @showing(LayerPreconditioned.__init__)
    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        rank: float = 0.1,
        select: str = "switch",
        threshold: float = 0.5,
        steps_per_epoch: int | None = None,
        every: int = 100,
        seed: int = 0,
        **options: Unpack[LayerOptions],
    ) -> None:
        if select not in SELECTIONS:
            raise ValueError(f"select={select!r} is unknown; choose one of {list(SELECTIONS)}")
        if select == "switch" and steps_per_epoch is None:
            raise ValueError("select='switch' compares epochs: give steps_per_epoch=len(loader), or another select=")
        self._regime = Regime(steps_per_epoch, threshold) if select == "switch" else None
        method = KeptSamples(rank, KEEPING[0] if select == "switch" else select)
        super().__init__(model, params, method, every, every, seed, **options)

    def _directions(self) -> dict[Tensor, Tensor]:
        directions = super()._directions()
        if self._regime is not None:
            self._regime.see(self.param_groups, self._completed)
            self._method = replace(self._method, select=self._regime.select)  # type: ignore[type-var]
        return directions

    def _own_state(self) -> dict[str, Any]:
        own = super()._own_state()
        if self._regime is not None:
            own["preconditioner"]["regime"] = self._regime.state_dict(self.param_groups)
        return own

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        if self._regime is not None:
            check_regime(state["preconditioner"].get("regime"), self.param_groups)

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        super()._load_own_state(state)
        if self._regime is not None:
            self._regime.load_state_dict(state["preconditioner"]["regime"], self.param_groups)
            self._method = replace(self._method, select=self._regime.select)  # type: ignore[type-var]
