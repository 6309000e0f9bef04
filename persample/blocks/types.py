"""Blocks: the per-sample gradient of one parameter, in factored form.

The per-sample gradient of a parameter is a linear map with B rows, one row g_b = ∂ℓ_b/∂θ for each sample.
A block holds the factors of that map and knows nothing of where they came from; what is computed with it
(gradients, norms, Gram matrix, weighted sum, inner products) is the business of `persample.blocks.reductions`.

    symbol          meaning                                                     shape
    B (batch)       samples
    T (time)        positions in one sample: tokens, pixels, uses of a module
    x               what the weight is multiplied with: the operation's input   [B, T, I]
    z               gradient of that sample's own loss w.r.t. the output        [B, T, O]
    g_b             the per-sample gradient                                     the parameter's shape

Factors keep the precision they were captured in; reductions accumulate half precision in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import prod

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from persample.blocks.convolution.gradients import ConvSpec


class Block:
    """Base of all blocks: `batch` rows, each of the parameter's `shape`."""

    def at(self, samples: slice | Tensor) -> Block:
        """The rows of some samples: every tensor that a block holds counts them along dimension 0."""
        return with_factors(self, lambda factor: factor[samples])

    @property
    def batch(self) -> int:
        """Number of samples B."""
        raise NotImplementedError(f"{type(self).__name__} defines batch")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row: the parameter's shape."""
        raise NotImplementedError(f"{type(self).__name__} defines shape")

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The tensors the block holds."""
        raise NotImplementedError(f"{type(self).__name__} defines factors")

    @property
    def numel(self) -> int:
        """Entries of one row."""
        return prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the results: that of the factors, but float32 for half precision."""
        dtype = self.factors[-1].dtype
        return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype

    @property
    def device(self) -> torch.device:
        """Where the factors live."""
        return self.factors[-1].device

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return sum(factor.nbytes for factor in self.factors)


def with_factors(block: Block, change: Callable[[Tensor], Tensor]) -> Block:
    """Returns the block with other tensors for its factors."""
    if isinstance(block, Pulled):
        return replace(block, inner=with_factors(block.inner, change))
    if isinstance(block, Stacked):
        return replace(block, parts=tuple((index, with_factors(part, change)) for index, part in block.parts))
    held = {each.name: getattr(block, each.name) for each in fields(block)}  # type: ignore[arg-type]
    tensors = {name: change(value) for name, value in held.items() if isinstance(value, Tensor)}
    return replace(block, **tensors)  # type: ignore[type-var]


@dataclass(frozen=True)
class Outer(Block):
    """g_b = Σ_t z_bt ⊗ x_bt, of shape [O, I]: weights of linear layers."""

    x: Float[Tensor, "batch time inp"]
    z: Float[Tensor, "batch time out"]

    @property
    def batch(self) -> int:
        return self.z.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.z.shape[2], self.x.shape[2]

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.x, self.z

    @property
    def transposed(self) -> Outer:
        """The same rows, each transposed: shape [I, O]."""
        return Outer(self.z, self.x)


@dataclass(frozen=True)
class Conv(Block):
    """g_b = weight gradient of a (transposed) convolution of x_b, of shape `spec.weight_shape`.

    The same as `Outer` with x the input patches, which are never formed unless that is fastest.
    """

    x: Float[Tensor, "batch inp *space"]
    z: Float[Tensor, "batch out *space_out"]
    spec: ConvSpec

    @property
    def batch(self) -> int:
        return self.z.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.weight_shape

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.x, self.z


@dataclass(frozen=True)
class Rows(Block):
    """g_b = Σ_t e_(indices_bt) ⊗ z_bt, of shape [rows, D]: a table of which few rows are touched."""

    indices: Int[Tensor, "batch time"]
    z: Float[Tensor, "batch time dim"]
    rows: int

    @property
    def batch(self) -> int:
        return self.z.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, self.z.shape[2]

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.indices, self.z


@dataclass(frozen=True)
class Dense(Block):
    """g_b = values_b: biases, normalisations, anything without more structure."""

    values: Float[Tensor, "batch *shape"] | Complex[Tensor, "batch *shape"]

    @property
    def batch(self) -> int:
        return self.values.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return (self.values,)


@dataclass(frozen=True)
class Pulled(Block):
    """g_b = pull(inner_b): a block behind a linear map, the pull-back of operations on the parameter alone.

    `pull` maps rows [n, *inner.shape] to rows [n, *shape] for any n. `isometric` says that it preserves
    inner products (a transpose, a view, a slice), so that norms and Gram need no materialising.
    """

    inner: Block
    pull: Callable[[Tensor], Tensor]
    pulled_shape: tuple[int, ...]
    isometric: bool = False

    @property
    def batch(self) -> int:
        return self.inner.batch

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pulled_shape

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.inner.factors


@dataclass(frozen=True)
class Stacked(Block):
    """g_b is made of slices along `dim`, each a block of its own; those without one are zero."""

    parts: tuple[tuple[int, Block], ...]
    """(place along the axis, block of the shape of a slice); one at least, each place once."""
    dim: int
    stacked_shape: tuple[int, ...]

    @property
    def batch(self) -> int:
        return self.parts[0][1].batch

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stacked_shape

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return tuple(factor for _, part in self.parts for factor in part.factors)


@dataclass(frozen=True)
class Outputs(Block):
    """g_bc = the weight gradient of x_b and z_bc, of each of C outputs of a sample: row b·C + c.

    Outer products z ⊗ x, or x ⊗ z where `transposed`; with `spec` a convolution. See `persample.blocks.kinds.outputs`.
    """

    x: Tensor
    """[B, T, I] or [B, inp, *space], of all outputs."""
    z: Tensor
    """[B, C, T, O] or [B, C, out, *space_out]."""
    spec: ConvSpec | None = None
    transposed: bool = False

    def at(self, samples: slice | Tensor) -> Block:
        """Some of the rows, as a block of one output."""
        chosen = torch.arange(self.batch, device=self.z.device)[samples]
        return self._ordinary(self.x[chosen // max(self.outputs, 1)], self.z.flatten(0, 1)[chosen])

    @property
    def outputs(self) -> int:
        """Number of outputs C."""
        return self.z.shape[1]

    @property
    def batch(self) -> int:
        return self.z.shape[0] * self.z.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        if self.spec is not None:
            return self.spec.weight_shape
        shape = self.z.shape[3], self.x.shape[2]
        return shape[::-1] if self.transposed else shape

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.x, self.z

    def one(self, output: int) -> Block:
        """The block of one output, B rows."""
        return self._ordinary(self.x, self.z[:, output])

    @property
    def turned(self) -> Outputs:
        """The same rows, each transposed."""
        return replace(self, transposed=not self.transposed)

    @property
    def each(self) -> list[Block]:
        """The blocks of all outputs."""
        return [self.one(output) for output in range(self.outputs)]

    @property
    def wide(self) -> Block | None:
        """One block of B rows, each of them those of all outputs one after the other; None where there is no such."""
        if self.spec is None:
            return None if self.transposed else Outer(self.x, self.z.movedim(1, 2).flatten(2))  # [B, T, C·O]
        if self.spec.transposed or self.spec.groups > 1:
            return None
        channels, *others = self.spec.weight_shape
        spec = replace(self.spec, weight_shape=(self.outputs * channels, *others))
        return Conv(self.x, self.z.flatten(1, 2), spec)

    def _ordinary(self, x: Tensor, z: Tensor) -> Block:
        if self.spec is not None:
            return Conv(x, z, self.spec)
        return Outer(z, x) if self.transposed else Outer(x, z)
