"""The reductions of per-sample gradients: what is formed of them, however they are held.

`persample.result.per_sample_grads` holds factors, `persample.result.holding.graph_held` the graph; both show every
parameter's gradient in turn (`_each`), and a reduction adds up what it forms of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from persample.blocks.precision import full_precision
from persample.projections import Projection
from persample.projections.families import maps_of
from persample.result.accumulating import COPY, accumulate
from persample.result.arguments import by_layer, check_alike, check_vectors, clip_factors, refuse_other
from persample.result.centred import mean_of, refuse_mean, without_mean
from persample.result.gradients import Gradients, reduction
from persample.result.grouping import Per, PerPosition, groups_of, total, transposed


class Quantities(Gradients):
    """What is formed of the gradients g_b of one batch; base of the results, which say how they are held."""

    @reduction
    def norms(self, per: PerPosition = "total") -> Float[Tensor, " batch"] | dict[str, Float[Tensor, "batch ..."]]:
        """Returns the Euclidean norms ‖g_b‖, [B], over all parameters or for each layer or parameter.

        Args:
            per: over all parameters ("total"), or a dict for each "layer" or "param". Or, of parameters whose gradients
                are sums over positions (tokens, pixels, calls), "position": parameter name -> [B, T], the norms of the
                *shares* of positions, z_bt ⊗ x_bt. A share is what the position's use of the parameter adds to g_b, and
                not the gradient of a loss at that position; see `persample.blocks.positions`.

        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> psg = persample.per_sample(nn.Linear(2, 1, bias=False), lambda y, _: y.sum(1), x)
        >>> psg.norms()
        tensor([5., 1.])
        >>> psg.norms(per="position")  # one position in each sample
        {'weight': tensor([[5.],
                [1.]])}
        """
        if per == "position":
            return self._by_position(lambda _, gradient: gradient.norms_of_positions())
        return total(self._norms(per), per)

    @reduction
    def gram(
        self, per: PerPosition = "total", other: Quantities | Any | None = None, *, centred: bool = False
    ) -> Float[Tensor, "batch other"] | dict[str, Float[Tensor, "batch other ..."]]:
        """Returns the Gram matrix K_ab = ⟨g_a, g_b⟩, [B, B], or ⟨g_a, h_b⟩, [B, B'], with `other`'s rows h_b.

        Args:
            per: over all parameters ("total"), or a dict for each "layer" or "param"; or "position", parameter name ->
                [B, T, B', T'], of the shares of positions, as for `norms`.
            other: per-sample gradients of the same parameters on another batch, or at another point; what `per_sample`
                returned, in chunks or not.
            centred: of the gradients without their mean, ⟨g_a - ḡ, g_b - ḡ⟩.

        Raises:
            ValueError: `other` holds other parameters; or `centred` with `other`, or with positions.

        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> psg = persample.per_sample(nn.Linear(2, 1, bias=False), lambda y, _: y.sum(1), x)
        >>> psg.gram()
        tensor([[25.,  4.],
                [ 4.,  1.]])
        >>> psg.gram(centred=True)
        tensor([[ 4.5000, -4.5000],
                [-4.5000,  4.5000]])
        """
        if centred:
            alone = refuse_mean(other, per)
            matrices = self.gram(alone)

            def by_rows() -> Tensor | dict[str, Tensor]:
                return self._gram_around(alone, self, mean_of(self.weighted_sum, self.losses))

            return without_mean(matrices, by_rows)
        if other is not None and not isinstance(other, Quantities):
            return transposed(refuse_other(other).gram(per, self))
        if per != "position":
            self._condense()
        right = self if other is None else other
        check_alike(self._parameters, right._parameters)
        if other is not None:
            other._require()
        theirs = {} if other is None else other._held()
        if per == "position":
            return self._by_position(lambda name, each: each.gram_of_positions(theirs.get(name, each)), right)
        matrices = self._each(lambda name, gradient: gradient.gram(theirs.get(name, gradient)))
        return total(self._grouped(matrices, per, (self.batch, right.batch)), per)

    @reduction
    def weighted_sum(
        self, c: Float[Tensor, " batch"] | Mapping[str, Float[Tensor, " batch"]]
    ) -> dict[str, Inexact[Tensor, " *shape"]]:
        """Returns Σ_b c_b g_b for every parameter: name -> shape. No per-sample gradient is formed.

        Args:
            c: coefficients [B]; or a dict layer -> [B], one for each layer of `layers`.

        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> psg = persample.per_sample(nn.Linear(2, 1, bias=False), lambda y, _: y.sum(1), x)
        >>> psg.weighted_sum(torch.tensor([1.0, 2.0]))
        {'weight': tensor([[3., 6.]])}
        """
        return self._weighted_sum(by_layer(c, self.layers, self.batch))

    @reduction
    def dot(
        self, vectors: Mapping[str, Inexact[Tensor, " *shape"] | Inexact[Tensor, "k *shape"]]
    ) -> Float[Tensor, " batch"] | Float[Tensor, "batch k"]:
        """Returns the inner products ⟨g_b, v⟩, [B], with v given as parameter name -> [*shape].

        Or those with k directions at once, ⟨g_b, v_k⟩, [B, k], of vectors [k, *shape]: at little more than the cost of
        one where samples have many positions. No more than a few MiB of rows are there at a time.

        Parameters that are left out count as v = 0.

        Raises:
            ValueError: a name that is no trainable parameter, a vector of another shape, or another number of
                directions than for the others.

        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> psg = persample.per_sample(nn.Linear(2, 1, bias=False), lambda y, _: y.sum(1), x)
        >>> psg.dot({"weight": torch.ones(1, 2)})
        tensor([7., 1.])
        >>> psg.dot({"weight": torch.tensor([[[1.0, 1.0]], [[2.0, 0.0]], [[0.0, 1.0]]])})
        tensor([[7., 6., 4.],
                [1., 0., 1.]])
        """
        many = check_vectors(vectors, self._parameters)
        lines = vectors if many is not None else {name: vector[None] for name, vector in vectors.items()}
        parts = self._each(lambda name, gradient: gradient.dot(lines[name]) if name in lines else None)
        found = self.losses.new_zeros(self.batch, 1 if many is None else many, dtype=full_precision(self.losses).dtype)
        for part in parts.values():
            found = found if part is None else found + part.to(found.device)
        return found[:, 0] if many is None else found

    @reduction
    def project(
        self, projection: Projection, per: Per = "total", *, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "batch k"] | dict[str, Float[Tensor, "batch k"]]:
        """Returns k random features of every gradient, [B, k], with E⟨Pg, Ph⟩ = ⟨g, h⟩, over all parameters.

        The same seed and names of parameters give the same features for every batch, in every process and on every
        device, to rounding; so features can be stored, and inner products be taken of them instead of gradients.

        Args:
            projection: one of `persample.projections`: `Kronecker(inp, out)`, which is the cheapest, `Rademacher(k)`,
                `SJLT(k)`, `Mask(k)`.
            per: features of all parameters ("total"), or a dict of those of each "layer" or "param".
            dtype: of the result; without, that of the other reductions.

        Raises:
            TypeError: no projection.

        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> psg = persample.per_sample(nn.Linear(2, 1, bias=False), lambda y, _: y.sum(1), x)
        >>> psg.project(persample.projections.Kronecker(8, 2)).shape
        torch.Size([2, 16])
        >>> psg.project(persample.projections.Mask(2)).abs()  # all entries there are
        tensor([[3., 4.],
                [0., 1.]])
        """
        maps = maps_of(projection, self._parameters, groups_of(self._parameters, per))
        found = self._each(lambda name, gradient: gradient.project(maps[name]))
        features = self._grouped(found, per, (self.batch, projection.k))
        return total({key: each.to(dtype or each.dtype) for key, each in features.items()}, per)

    @reduction
    def sum_of_squares(self) -> dict[str, Float[Tensor, " *shape"]]:
        """Returns Σ_b g_b ∘ g_b, entry by entry, for every parameter: name -> shape.

        B times the diagonal of the empirical Fisher matrix where the losses are negative log-likelihoods. Of complex
        gradients |g_b|², which is real. No more than a few MiB of rows are there at a time; weights of linear layers
        that each sample meets once need none.

        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> psg = persample.per_sample(nn.Linear(2, 1, bias=False), lambda y, _: y.sum(1), x)
        >>> psg.sum_of_squares()
        {'weight': tensor([[ 9., 17.]])}
        """
        return self._each(lambda _, gradient: gradient.sum_of_squares())

    @reduction
    def variance(self) -> dict[str, Float[Tensor, " *shape"]]:
        """Returns 1/B Σ_b (g_b - ḡ)², entry by entry, with ḡ = 1/B Σ_b g_b, for every parameter: name -> shape.

        This is the biased variance, `grads.var(0, correction=0)`; times B / (B - 1) it is the unbiased one. Deviations
        are formed before they are squared, so nothing is lost where samples agree. Of complex gradients |g_b - ḡ|²,
        which is real; without samples NaN.

        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> psg = persample.per_sample(nn.Linear(2, 1, bias=False), lambda y, _: y.sum(1), x)
        >>> psg.variance()
        {'weight': tensor([[2.2500, 2.2500]])}
        """
        return self._each(lambda _, gradient: gradient.variance())

    def backward(
        self,
        coefficients: Float[Tensor, " batch"] | Mapping[str, Float[Tensor, " batch"]] | None = None,
        *,
        process_group: Any | None = None,
    ) -> None:
        """Accumulates Σ_b c_b g_b into the parameters' `.grad`, as `loss.backward()` does; returns nothing.

        So one capture gives norms, or whatever coefficients are made from, and the step. What was in `.grad` is added
        to; parameters that are frozen by now, or that no loss depends on, are left alone. Hooks that a parameter has
        run as they do in any backward pass.

        Args:
            coefficients: [B], or a dict layer -> [B], as for `weighted_sum`. Without they are ones: the gradient of the
                *sum* of the losses. For the mean give `torch.full((B,), 1 / B)`.
            process_group: of DistributedDataParallel, `model.process_group`: `.grad` is then averaged over its
                processes, all of which must call this. Without, nothing is exchanged: replicas come apart unless
                `.grad` is averaged before the step.

        Raises:
            ValueError: coefficients of another shape, or layers that are not there.
            RuntimeError: a copied or loaded result, which knows no parameters.

        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> psg = persample.per_sample(model, lambda y, _: y.sum(1), x)
        >>> psg.backward(1 / psg.norms())  # (3, 4) / 5 + (0, 1)
        >>> model.weight.grad
        tensor([[0.6000, 1.8000]])
        """
        if self._copied:
            raise RuntimeError(COPY)
        c = torch.ones_like(self.losses) if coefficients is None else coefficients
        accumulate(self._parameters, self.weighted_sum(c), self.unused, process_group)

    @reduction
    def clipped_sum(self, max_norm: float | int | Mapping[str, float]) -> dict[str, Inexact[Tensor, " *shape"]]:
        """Returns Σ_b min(1, C / ‖g_b‖) g_b for every parameter, as differentially private training needs it.

        What is added of each sample is within the bound, rounding included. A sample whose gradient is NaN or infinite
        has no norm, and makes the sum NaN.

        Args:
            max_norm: C > 0, the bound of each sample's norm over all parameters; or a dict layer -> C, which
                clips each layer by its own norm.

        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> psg = persample.per_sample(nn.Linear(2, 1, bias=False), lambda y, _: y.sum(1), x)
        >>> psg.clipped_sum(max_norm=1.0)  # (3, 4) / 5 + (0, 1)
        {'weight': tensor([[0.6000, 1.8000]])}
        """
        return self._weighted_sum(clip_factors(self._norms, max_norm, self.layers))
