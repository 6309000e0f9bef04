"""`jacobian`, and what it returns: the gradients of every output of every sample, with an axis for the outputs.

With f_b [C] the outputs of sample b, J_b = ∂f_b/∂θ has C rows; a Jacobian is the per-sample gradients of B·C losses
f_bc that share their inputs (`persample.blocks.kinds.outputs`). H_b being the Hessian of a loss at f_b, S_b its root,

    Gauss–Newton matrix   G = Σ_b J_bᵀ H_b J_b = Σ_b (S_b J_b)ᵀ (S_b J_b)

so what is asked of G is asked of the rows of S J: a Jacobian again, `Jacobian.ggn`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor, nn

from persample.backends.jacobian import capture_jacobian
from persample.blocks.kinds.outputs import combined
from persample.capture.eagerly import eagerly
from persample.capture.sharded import refuse_sharded
from persample.capture.types import Capture, Problem
from persample.projections import Projection
from persample.result.api import arguments_of, refuse_gradient_hooks, refuse_meta, refuse_nothing, state_of
from persample.result.arguments import check_outputs, check_size, root_of, selected
from persample.result.centred import refuse_mean, without_mean
from persample.result.explanation import Explanation
from persample.result.grouping import Per
from persample.result.holding.chunked import ChunkedPerSampleGrads, batch_of
from persample.result.holding.unchanged import addresses
from persample.result.holding.whole import whole
from persample.result.per_sample_grads import PerSampleGrads


@torch.compiler.disable
def jacobian(
    model: nn.Module,
    inputs: Any,
    *,
    params: Iterable[str | Tensor] | None = None,
    output_fn: Callable[[Any], Inexact[Tensor, "batch *out"]] | None = None,
    check: bool = True,
    chunk_size: int | None = None,
) -> Jacobian:
    """Returns the Jacobian ∂f_bc/∂θ of the outputs of every sample, as factors.

    One forward pass, and one backward pass for each of the C outputs of a sample, to the operations that use
    parameters; factors that no output changes are held once. Rows, Gram matrix (the empirical neural tangent kernel)
    and sums are formed from these when asked for.

    Args:
        model: any eager PyTorch module whose samples do not influence each other.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments for the model.
        params: names of parameters, or the tensors themselves; by default all that require a gradient.
        output_fn: from what the model returns to the outputs, for models that return no tensor, or too many: `lambda
            out: out.logits[:, -1]`. Along dimension 0 outputs count samples.
        check: as in `per_sample`.
        chunk_size: samples held at once, as in `per_sample`: their factors are C times z. There is no `hold="graph"`:
            a parameter's factors are complete when the last output has been through the graph.

    Raises:
        CoupledSamplesError, CheckError, UnsupportedError, PerSampleError: as in `per_sample`.
        TypeError, ValueError: outputs that are no tensor of real numbers, [B, *out]; parameters that are not there.

    Example:
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
        >>> jac = jacobian(model, x)
        >>> jac.rows()["weight"].shape, jac.gram().shape
        (torch.Size([5, 2, 2, 3]), torch.Size([5, 2, 5, 2]))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module; got {type(model).__name__}. For outputs computed without a module use "
            "persample.from_losses(outputs.flatten(), params)"
        )
    parameters = selected(model, params)
    refuse_sharded(model, parameters)
    refuse_nothing(model, parameters)
    refuse_gradient_hooks(parameters)
    refuse_meta(parameters)

    def chosen(returned: Any) -> Tensor:
        return check_outputs(returned if output_fn is None else output_fn(returned), output_fn is None)

    def losses(returned: Any, _: Any) -> Tensor:
        return chosen(returned).flatten()

    problem = Problem(model, losses, arguments_of(inputs), None, parameters, check=check)

    shape: list[int] = []
    random: dict[int, Any] = {}

    @eagerly
    def capture(some_inputs: Any, root: Any) -> PerSampleGrads:
        part = replace(problem, inputs=some_inputs)
        outputs, captured = capture_jacobian(part, chosen)
        shape[:] = outputs.shape[1:]
        rows = PerSampleGrads(captured, parameters, "outputs", addresses(part.within_reach))
        return rows if root is None else combinations(rows, root)

    def in_chunks(root: Tensor | None) -> ChunkedPerSampleGrads:
        together = whole(problem) if check and root is None else None  # else checked before
        data = capture, problem.inputs, root, chunk_size or 1, batch or 0, state_of(model), together
        return ChunkedPerSampleGrads(*data, several=True, random=random)

    batch = batch_of(problem.inputs)
    check_size(chunk_size)
    if chunk_size is None or batch is None or batch <= chunk_size:
        rows = capture(problem.inputs, None)
        return Jacobian(rows, rows.losses.view(-1, *shape) if shape else rows.losses)
    parts = in_chunks(None)
    return Jacobian(parts, parts.losses.view(batch, *shape), in_chunks)


class Jacobian:
    """The gradients g_bc = ∂f_bc/∂θ of every output of every sample, held as factors.

    With C = prod(out) outputs of a sample. Results have the precision of the parameters, float32 where those are half
    precision, and carry no graph.

    Attributes:
        outputs: f, [B, *out].

    >>> persample.jacobian(nn.Linear(3, 2), torch.randn(5, 3)).outputs.shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        rows: PerSampleGrads | ChunkedPerSampleGrads,
        outputs: Tensor,
        again: Callable[[Tensor], ChunkedPerSampleGrads] | None = None,
    ) -> None:
        """`again`: from roots S to the rows S J, of a Jacobian in chunks."""
        self._rows, self.outputs, self._again = rows, outputs, again

    def __repr__(self) -> str:
        return f"Jacobian(outputs={list(self.outputs.shape)}, {self._rows!r})"

    @property
    def batch(self) -> int:
        """Number of samples B.

        >>> persample.jacobian(nn.Linear(3, 2), torch.randn(5, 3)).batch
        5
        """
        return len(self.outputs)

    @property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """Names of the parameters of each layer, as `PerSampleGrads.layers`.

        >>> persample.jacobian(nn.Linear(3, 2), torch.randn(5, 3)).layers
        {'': ('weight', 'bias')}
        """
        return self._rows.layers

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the parameters that no output depends on; their gradients are zero.

        >>> persample.jacobian(nn.Linear(3, 2), torch.randn(5, 3)).unused
        ()
        """
        return self._rows.unused

    def rows(self) -> dict[str, Inexact[Tensor, "batch *out_and_shape"]]:
        """Returns g_bc for every parameter: name -> [B, *out, *shape].

        >>> persample.jacobian(nn.Linear(3, 1, bias=False), torch.ones(2, 3)).rows()["weight"]
        tensor([[[[1., 1., 1.]]],
        <BLANKLINE>
        <BLANKLINE>
                [[[1., 1., 1.]]]])
        """
        return {name: each.view(*self.outputs.shape, *each.shape[1:]) for name, each in self._rows.grads().items()}

    def norms(self, per: Per = "total") -> Float[Tensor, "batch *out"] | dict[str, Float[Tensor, "batch *out"]]:
        """Returns ‖g_bc‖, [B, *out], over all parameters or for each layer or parameter.

        Squared and added over the outputs they are ‖J_b‖², and those of `ggn(H)` tr(J_bᵀ H_b J_b).

        >>> persample.jacobian(nn.Linear(4, 2, bias=False), torch.ones(1, 4)).norms()
        tensor([[2., 2.]])
        """
        return _each(self._rows.norms(per), self._by_output)

    def gram(
        self, per: Per = "total", other: Jacobian | None = None, *, centred: bool = False
    ) -> Float[Tensor, "batch outs other other_outs"] | dict[str, Float[Tensor, "batch outs other other_outs"]]:
        """Returns ⟨g_bc, g_b'c'⟩, [B, C, B, C]: the empirical neural tangent kernel; with `other` [B, C, B', C'].

        Outputs of several axes are counted in one, C = prod(out), the last axis fastest. Jacot, Gabriel and Hongler,
        *Neural Tangent Kernel*, 2018, equation 4 at the present parameters.

        Args:
            per: over all parameters ("total"), or a dict for each "layer" or "param".
            other: the Jacobian of another batch, or at another point, for the same parameters.
            centred: of the rows of each output without their mean over the batch.

        Raises:
            TypeError, ValueError: `other` is no Jacobian, or of other parameters; or `centred` with `other`.

        >>> persample.jacobian(nn.Linear(3, 2, bias=False), torch.ones(1, 3)).gram()
        tensor([[[[3., 0.]],
        <BLANKLINE>
                 [[0., 3.]]]])
        """
        if other is not None and not isinstance(other, Jacobian):
            raise TypeError(
                f"other must be what persample.jacobian returned for another batch; got {type(other).__name__}"
            )
        if centred:
            refuse_mean(other, per)
            return without_mean(self.gram(per), lambda: self._around_means(per))
        right = self if other is None else other
        shape = (self.batch, self._count, right.batch, right._count)
        return _each(self._rows.gram(per, None if other is None else other._rows), lambda found: found.view(shape))

    def dot(
        self, vectors: Mapping[str, Inexact[Tensor, " *shape"] | Inexact[Tensor, "k *shape"]]
    ) -> Float[Tensor, "batch *out"] | Float[Tensor, "batch *out_k"]:
        """Returns J_b v, [B, *out], with v given as parameter name -> [*shape]; of k directions [B, *out, k].

        Parameters that are left out count as v = 0.

        >>> jac = persample.jacobian(nn.Linear(3, 2, bias=False), torch.ones(1, 3))
        >>> jac.dot({"weight": torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])})
        tensor([[3., 6.]])
        """
        return self._by_output(self._rows.dot(vectors))

    def weighted_sum(
        self, weights: Float[Tensor, "batch *out"] | Mapping[str, Float[Tensor, "batch *out"]]
    ) -> dict[str, Inexact[Tensor, " *shape"]]:
        """Returns Σ_bc w_bc g_bc = Jᵀ w for every parameter: name -> shape. No row is formed.

        Args:
            weights: [B, *out]; or a dict layer -> [B, *out], one for each layer of `layers`.

        Raises:
            ValueError: weights of another shape.

        >>> jac = persample.jacobian(nn.Linear(3, 2, bias=False), torch.ones(1, 3))
        >>> jac.weighted_sum(torch.tensor([[1.0, 2.0]]))["weight"]
        tensor([[1., 1., 1.],
                [2., 2., 2.]])
        """
        return self._rows.weighted_sum(_each(weights, self._flat))

    def sum_of_squares(self) -> dict[str, Float[Tensor, " *shape"]]:
        """Returns Σ_bc g_bc ∘ g_bc for every parameter: name -> shape; of `ggn(H)` the diagonal of Σ_b J_bᵀ H_b J_b.

        >>> persample.jacobian(nn.Linear(3, 1, bias=False), torch.ones(2, 3)).sum_of_squares()["weight"]
        tensor([[2., 2., 2.]])
        """
        return self._rows.sum_of_squares()

    def project(
        self, projection: Projection, per: Per = "total", *, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "batch *out_k"] | dict[str, Float[Tensor, "batch *out_k"]]:
        """Returns k random features of every g_bc, [B, *out, k], as `PerSampleGrads.project`.

        >>> jac = persample.jacobian(nn.Linear(3, 2), torch.randn(5, 3))
        >>> jac.project(persample.projections.Rademacher(16)).shape
        torch.Size([5, 2, 16])
        """
        return _each(self._rows.project(projection, per, dtype=dtype), self._by_output)

    def ggn(self, hessian: Float[Tensor, "batch *out_out"]) -> Jacobian:
        """Returns the Jacobian with rows S_b J_b, where S_b² = H_b: of the generalised Gauss–Newton matrix.

        G_b = J_bᵀ H_b J_b is (S_b J_b)ᵀ (S_b J_b). So `ggn(H).gram()`, as a matrix [BC, BC], has the eigenvalues of
        Σ_b G_b other than zero; `norms()` squared and added over the outputs are tr G_b; `sum_of_squares()` is the
        diagonal of Σ_b G_b. Only factors are combined: no row is formed. Schraudolph, *Fast Curvature Matrix-Vector
        Products for Second-Order Gradient Descent*, 2002.

        Args:
            hessian: H, of each sample's loss for its outputs, [B, *out, *out]: symmetric, no eigenvalue negative. Of
                cross-entropy diag(p) − ppᵀ with p = softmax(f), of ½‖f − y‖² the identity.

        Raises:
            ValueError: another shape, a Hessian that is not finite, not symmetric, or has negative eigenvalues.

        >>> jac = persample.jacobian(nn.Linear(3, 2), torch.randn(5, 3))
        >>> p = jac.outputs.softmax(1)
        >>> jac.ggn(p.diag_embed() - p[:, :, None] * p[:, None]).norms().square().sum(1).shape  # tr G_b
        torch.Size([5])
        """
        root = root_of(hessian, tuple(self.outputs.shape))
        if isinstance(self._rows, PerSampleGrads):
            return Jacobian(combinations(self._rows, root), self.outputs)
        assert self._again is not None, "rows in chunks come with it"
        return Jacobian(self._again(root), self.outputs)

    def explain(self) -> list[Explanation]:
        """Returns what `PerSampleGrads.explain` does.

        >>> [use.block for use in persample.jacobian(nn.Linear(3, 2), torch.randn(5, 3)).explain()]
        ['Outputs', 'Dense']
        """
        return self._rows.explain()

    def _around_means(self, per: Per) -> Any:
        """The centred Gram matrix, from rows."""
        chosen = torch.eye(self._count, device=self.outputs.device).expand(self.batch, -1, -1) / max(self.batch, 1)
        means = [self._rows.weighted_sum(c.reshape(-1)) for c in chosen.to(self._rows.losses).unbind(2)]
        centers = {name: torch.stack([mean[name] for mean in means]) for name in means[0]}
        shape = (self.batch, self._count, self.batch, self._count)
        with torch.no_grad():
            matrices = self._rows._gram_around(per, self._rows, centers)  # type: ignore[arg-type]
            return _each(matrices, lambda found: found.view(shape))

    @property
    def _count(self) -> int:
        return prod(self.outputs.shape[1:])

    def _by_output(self, found: Tensor) -> Tensor:
        return found.view(*self.outputs.shape, *found.shape[1:])

    def _flat(self, weights: Tensor) -> Tensor:
        if not isinstance(weights, Tensor) or weights.shape != self.outputs.shape:
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(
                f"weights must have the shape of the outputs, [B, *out] = {tuple(self.outputs.shape)}; got {got}"
            )
        return weights.reshape(-1)


def combinations(rows: PerSampleGrads, root: Float[Tensor, "batch outs others"]) -> PerSampleGrads:
    """The rows Σ_c S_bcd g_bc, from factors alone."""
    with torch.no_grad():
        rows._require()
        uses = {
            name: tuple(replace(use, block=combined(use.block, root.to(use.block.device))) for use in gradient.uses)
            for name, gradient in rows._held().items()
        }
    return PerSampleGrads(Capture(rows.losses, uses, rows.notes), rows._parameters, rows.backend)


def _each(found: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return {name: change(each) for name, each in found.items()} if isinstance(found, Mapping) else change(found)
