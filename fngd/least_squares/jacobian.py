"""The Jacobian J = ∂s/∂θ of scaled residuals: its rows, J Jᵀ, JᵀJ and products, whole or a chunk of rows at a time.

Rows come from `persample`, which reads them off the autograd graph that the residuals already have. Derivatives of
the network with respect to its inputs make a graph in which every weight is used several times; all uses count.

    rows (persample.grad)  one backward pass and B outer products   against B backward passes by a loop
    J v                    the backward pass of Jᵀu, differentiated in u (which is linear in u)
    Jᵀ a                   one backward pass
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import persample
from fngd.least_squares.residuals import Residuals
from fngd.least_squares.solvers import symmetric_product

FORMS = ("auto", "rows", "factored")
HELD_BYTES = 2**29
"""Of J, and of rows that stand for it, no more is held at once unless told so."""


class Jacobian:
    """∂s/∂θ at the point where `residuals` were computed; holds their graph, and J only if told so.

    Arguments:
        residuals: with their graph.
        params: P parameters all together.
        again: computes the same residuals once more, for the factored form.
        chunk: rows held at once; None for all. Then peak memory beside the graph is that of 3 · chunk · P numbers.
        factored: form J Jᵀ from the blocks of `persample.per_sample`, parameter by parameter; J never exists.
        check: verify that rows add up to the gradient of the sum.
    """

    def __init__(
        self,
        residuals: Residuals,
        params: Sequence[Tensor],
        again: Callable[[], Residuals],
        *,
        chunk: int | None = None,
        factored: bool = False,
        check: bool = True,
    ) -> None:
        self.residuals, self.params, self.again = residuals, list(params), again
        self.chunk, self.factored, self.check = chunk, factored, check
        self.scaled = residuals.scaled
        self.size = sum(p.numel() for p in self.params)
        self._held: Tensor | None = None
        self._linear: tuple[Tensor, Tensor] | None = None

    def pieces(self) -> list[tuple[str, int, int]]:
        """Group and range of rows of each piece; without `chunk` a piece is a group."""
        found = []
        for name, group in self.residuals.groups.items():
            step = self.chunk or len(group)
            found += [(name, start, min(start + step, len(group))) for start in range(0, len(group), step)]
        return found

    def rows(self, piece: tuple[str, int, int], out: Tensor | None = None) -> Float[Tensor, "rows size"]:
        """Rows of one piece, written into `out` if it is given."""
        name, start, stop = piece
        tilt = generic(stop - start, self.scaled)
        with torch.enable_grad():
            part = _connected(self.residuals.groups[name][start:stop] * tilt, self.params)
        grads = persample.grad(part, self.params, check=self.check)
        scale = (self.residuals.factor(name, start, stop) / tilt).unsqueeze(1)
        if out is None:
            out = self.scaled.new_empty(stop - start, self.size, requires_grad=False)
        place = 0
        for grad, param in zip(grads, self.params, strict=True):
            torch.mul(grad.reshape(stop - start, -1), scale, out=out[:, place : place + param.numel()])
            place += param.numel()
        return out

    def placed(self) -> Iterator[tuple[slice, tuple[str, int, int]]]:
        """Pieces with their places among all rows."""
        start = 0
        for piece in self.pieces():
            stop = start + piece[2] - piece[1]
            yield slice(start, stop), piece
            start = stop

    @property
    def whole(self) -> Float[Tensor, "batch size"]:
        """J itself, [B, P]; kept, in float64. Of float32 parameters K has then no rounding errors of its own."""
        if self._held is None:
            held = self.scaled.new_empty(len(self.scaled), self.size, dtype=torch.float64, requires_grad=False)
            for place, piece in self.placed():
                self.rows(piece, held[place])
            self._held = held
        return self._held

    @property
    def holds_rows(self) -> bool:
        """Whether J is formed as a whole."""
        return self.chunk is None and not self.factored

    @property
    def noise(self) -> float:
        """The part of tr K below which eigenvalues are rounding errors, where the parameters are no float64."""
        eps = torch.finfo(self.scaled.dtype).eps
        return 0.0 if self.scaled.element_size() == 8 else eps**2 if self.holds_rows else eps

    def gram(self) -> Float[Tensor, "batch batch"]:
        """K = J Jᵀ. In chunks every pair of pieces is formed anew: n(n + 1)/2 captures for n pieces."""
        if self.holds_rows:
            return symmetric_product(self.whole)
        result = self.scaled.new_empty(len(self.scaled), len(self.scaled), requires_grad=False)
        placed = list(self.placed())
        form = self._factors if self.factored else self.rows
        product = self._factored_product if self.factored else _product
        for number, (place, piece) in enumerate(placed):
            first = form(piece)
            for other_place, other in placed[number:]:
                block = product(first, piece, first if other is piece else form(other), other)
                result[place, other_place] = block
                if other is not piece:
                    result[other_place, place] = block.T
        return result

    def normal_matrix(self) -> Float[Tensor, "size size"]:
        """JᵀJ, one piece after the other."""
        if self.holds_rows:
            return symmetric_product(self.whole.T)
        result = self.scaled.new_zeros(self.size, self.size, requires_grad=False)
        for piece in self.pieces():
            rows = self.rows(piece)
            result.addmm_(rows.T, rows)
        return result

    def transposed(self, a: Float[Tensor, " batch"]) -> Float[Tensor, " size"]:
        """Jᵀa."""
        if self._held is not None:
            return self._held.T @ a.to(self._held.dtype)
        grads = torch.autograd.grad(
            self.scaled, self.params, a.to(self.scaled.dtype), retain_graph=True, allow_unused=True
        )
        return flatten(grads, self.params)

    def apply(self, v: Float[Tensor, " size"]) -> Float[Tensor, " batch"]:
        """J v."""
        if self._held is not None:
            return self._held @ v.to(self._held.dtype)
        if self._linear is None:
            u = torch.zeros_like(self.scaled, requires_grad=True)
            with torch.enable_grad():
                grads = torch.autograd.grad(
                    self.scaled, self.params, u, create_graph=True, retain_graph=True, allow_unused=True
                )
                self._linear = u, flatten(grads, self.params)
        u, image = self._linear
        if not image.requires_grad:
            return torch.zeros_like(self.scaled, requires_grad=False)
        return torch.autograd.grad(image, u, v.to(image.dtype), retain_graph=True)[0]

    def compressed(self, rank: int, generator: torch.Generator) -> Float[Tensor, "rank size"]:
        """J̃ = S J in float64: about `rank` sums of rows with random signs, each row in one of them; E[J̃ᵀJ̃] = JᵀJ.

        The sums are formed before the derivatives are: a row of J̃ costs what a row of J does, however many it stands
        for. At most `HELD_BYTES` of them are formed, and all rows of J themselves where there are no more.
        """
        rank = max(1, min(rank, HELD_BYTES // (8 * self.size)))
        found = []
        for name, group in self.residuals.groups.items():
            count = min(len(group), math.ceil(rank * len(group) / len(self.scaled)))
            order = torch.randperm(len(group), generator=generator).to(group.device)
            signs = (2 * torch.randint(2, (len(group),), generator=generator) - 1).to(group)
            with torch.enable_grad():
                signed = _connected(group * (self.residuals.factor(name) * signs), self.params)
                sums = group.new_zeros(count).index_add(0, order % count, signed)
            grads = persample.grad(sums, self.params, check=self.check)
            found.append(torch.cat([grad.reshape(count, -1) for grad in grads], 1).double())
        return torch.cat(found)

    # --- the factored form ------------------------------------------------------------------------------------

    def _factors(self, piece: tuple[str, int, int]) -> persample.PerSampleGrads:
        name, start, stop = piece
        tilt = generic(stop - start, self.scaled)
        module = _Closure(self.params, lambda: _connected(self.again().groups[name][start:stop] * tilt, self.params))
        found = persample.per_sample(module, _residuals_themselves, (), check=self.check)
        if not isinstance(found, persample.PerSampleGrads):  # only with chunk_size, which is not given
            raise TypeError(f"per_sample returned {type(found).__name__}")
        known = self.residuals.groups[name][start:stop].detach() * tilt
        noise = torch.finfo(known.dtype).eps ** 0.5 * known.abs().amax()
        if not bool((found.losses.detach() - known).abs().amax() <= noise):
            raise ValueError(
                f"residuals of group {name!r} differ from call to call within a step, so gram='factored' would mix "
                "Jacobians of different functions: dropout in training mode, or points drawn in the closure? Use "
                "model.eval(), draw points between steps, or use gram='rows'"
            )
        return found

    def _factored_product(self, first: Any, piece: Any, second: Any, other: Any) -> Tensor:
        left, right = (
            self.residuals.factor(name, start, stop) / generic(stop - start, self.scaled)
            for name, start, stop in (piece, other)
        )
        return first.gram(other=None if second is first else second) * torch.outer(left, right)


def generic(count: int, like: Tensor) -> Float[Tensor, " count"]:
    """Fixed irregular numbers in [1, 2): rows are formed of residuals times these, and divided by them again.

    What reads rows off the graph looks at the gradient of their sum, and takes what it does not reach for unused. Sums
    vanish by design where residuals are centred, r − mean(r); irregular sums do not.
    """
    golden = (math.sqrt(5) - 1) / 2
    ramp = torch.arange(1, count + 1, dtype=torch.float64) * golden
    return (1 + ramp - ramp.floor()).to(like)


class _Closure(nn.Module):
    """The parameters and a function of them as a module, which is what `persample.per_sample` takes."""

    def __init__(self, params: Sequence[Tensor], function: Callable[[], Tensor]) -> None:
        super().__init__()
        self.function = function
        for place, param in enumerate(params):
            if not isinstance(param, nn.Parameter):
                raise ValueError(
                    "gram='factored' needs parameters of the type nn.Parameter; got a plain tensor. Wrap it in "
                    "nn.Parameter, or use gram='rows'"
                )
            self.register_parameter(f"p{place}", param)

    def forward(self) -> Tensor:
        return self.function()


def _connected(residuals: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The residuals; of a group that depends on no parameter with a graph that has one: its gradients are zeros."""
    wanted = {id(p) for p in params}
    stack, seen = [residuals.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in wanted:
            return residuals
        seen.add(node)
        stack += [source for source, _ in node.next_functions]
    return residuals + params[0].flatten()[:0].sum()


def _residuals_themselves(residuals: Tensor, _: Any) -> Tensor:
    return residuals


def _product(first: Any, _piece: Any, second: Any, _other: Any) -> Tensor:
    return first @ second.T


def flatten(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> Float[Tensor, " size"]:
    """One vector of the gradients of all parameters; zeros where there is none."""
    parts = [p.new_zeros(p.numel()) if g is None else g.reshape(-1) for g, p in zip(grads, params, strict=True)]
    return torch.cat(parts)
