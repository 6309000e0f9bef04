"""Reductions: what is computed with blocks.

Each is a function of a block; the default materialises the rows, and faster forms are registered by block
type. With K the Gram matrix, X and Z the factors of `persample.blocks.types`:

    materialise     g_b                                       [B, *shape]
    squared_norms   ‖g_b‖²                                    [B]
    gram            K_ab = ⟨g_a, h_b⟩                         [B, B']
    inner           ⟨g_b, h_b⟩ of two blocks of one batch     [B]
    weighted_sum    Σ_b c_b g_b                               [*shape]

Inner products of complex rows are those of the real vector space, Re Σ conj(g) h, because a real loss has a
gradient in that space. Work is cut into chunks of at most `persample.blocks.chunking.CHUNK_BYTES`.

Squared norms and Gram matrices that are formed without rows lose digits where their terms cancel: `terms`
(`persample.blocks.cancellation`) gets what they add up. What the uses of a parameter add up to:
`persample.blocks.sums`. Inner products with directions: `persample.blocks.directions`; sums over the batch of what
rows are squared to: `persample.blocks.consumed`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from math import prod
from mmap import PAGESIZE
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from persample import memory
from persample.blocks.cancellation import Terms
from persample.blocks.convolution import gradients as convolution
from persample.blocks.kinds import outer, tables
from persample.blocks.precision import full_precision
from persample.blocks.products import gram_of_rows, weight_product, weight_products
from persample.blocks.types import Block, Conv, Dense, Outer, Pulled, Rows


def real_rows(values: Tensor) -> Tensor:
    """Rows as real vectors, [B, *shape] -> [B, N] (2N when complex)."""
    values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    return values.reshape(values.shape[0], prod(values.shape[1:]))


# --- materialise ------------------------------------------------------------------------------------------


@singledispatch
def materialise(block: Block, out: Tensor | None = None) -> Tensor:
    """Returns the rows g_b themselves, [B, *shape]; written into `out` where it is given."""
    raise TypeError(
        f"no rule to materialise a block of type {type(block).__name__}; register one with "
        "persample.blocks.reductions.materialise.register"
    )


@materialise.register
def _(block: Outer, out: Tensor | None = None) -> Tensor:
    x, z = full_precision(block.x).detach(), full_precision(block.z).detach()  # a graph refuses `out=`
    out = memory.empty((block.batch, *block.shape), x) if out is None and x.dtype == z.dtype else out
    if x.shape[1] == 1:
        return torch.mul(z.transpose(1, 2), x, out=out)  # an outer product: no sum, so no matmul
    return weight_products(z, x, out)


@materialise.register
def _(block: Conv, out: Tensor | None = None) -> Tensor:
    return convolution.per_sample_grads(block.x, block.z, block.spec, out=out).contiguous()


@materialise.register
def _(block: Rows, out: Tensor | None = None) -> Tensor:
    batch, time, dim = block.z.shape
    z = full_precision(block.z)
    offsets = torch.arange(batch, device=block.device)[:, None] * block.rows
    # large fresh zeros are pages that nobody has touched: only rows that are written cost memory
    result = memory.zeros((batch, block.rows, dim), z) if out is None else out.zero_()
    flat = result.view(batch * block.rows, dim)
    flat.index_add_(0, (block.indices + offsets).reshape(-1), z.reshape(batch * time, dim))
    return result


@materialise.register
def _(block: Dense, out: Tensor | None = None) -> Tensor:
    if out is not None:
        return out.copy_(block.values)
    rows = full_precision(block.values)
    return rows.clone() if rows is block.values else rows  # the caller may write into the result


@materialise.register
def _(block: Pulled, out: Tensor | None = None) -> Tensor:
    rows = block.pull(materialise(block.inner))
    return rows if out is None else out.copy_(rows)


@singledispatch
def overwrites(block: Block) -> bool:
    """Whether rows are as cheaply written to memory used before: all their pages are, and no copy is made for it."""
    return False


@overwrites.register(Outer)
@overwrites.register(Conv)
def _(block: Block) -> bool:
    return all(full_precision(factor).dtype == block.dtype for factor in block.factors)


@overwrites.register
def _(block: Rows) -> bool:
    """Where a 16th of the pages is written to at least: one of fresh zeros that is not costs nothing.

    Measured in a virtual machine, milliseconds: 32 samples with 32 rows each of 1000 × 256, an eighth of the pages,
    11.9 fresh and 0.5 reused; 64 with 64 of 30,000 × 64, a 30th, 45 and 16, but for 490 MB that are kept.
    """
    row = block.shape[1] * block.dtype.itemsize
    return 16 * block.z.shape[1] * max(row, PAGESIZE) >= block.rows * row


@overwrites.register
def _(block: Dense) -> bool:
    return block.values.is_contiguous()  # a clone of other values would have their strides


def read_rows(block: Block) -> Tensor:
    """The rows g_b, [B, *shape], for reading only: those of a `Dense` block are its own, and no copy."""
    return full_precision(block.values) if isinstance(block, Dense) else materialise(block)


# --- weighted sum -----------------------------------------------------------------------------------------


@singledispatch
def weighted_sum(block: Block, c: Float[Tensor, " batch"]) -> Tensor:
    """Returns Σ_b c_b g_b, [*shape]."""
    rows = read_rows(block)
    return (c.to(rows.dtype) @ rows.reshape(block.batch, block.numel)).view(block.shape)


@weighted_sum.register
def _(block: Outer, c: Tensor) -> Tensor:
    x, z = full_precision(block.x), full_precision(block.z)
    return weight_product(z.flatten(0, 1), x.flatten(0, 1), c.to(z.dtype).repeat_interleave(z.shape[1]))


@weighted_sum.register
def _(block: Conv, c: Tensor) -> Tensor:
    return convolution.weighted_grad(block.x, block.z, block.spec, c)


@weighted_sum.register
def _(block: Rows, c: Tensor) -> Tensor:
    z = full_precision(block.z)
    scaled = (z * c.to(z.dtype)[:, None, None]).reshape(-1, z.shape[2])
    return z.new_zeros(block.shape).index_add_(0, block.indices.reshape(-1), scaled)


@weighted_sum.register
def _(block: Pulled, c: Tensor) -> Tensor:
    return block.pull(weighted_sum(block.inner, c)[None])[0]


# --- inner products of two blocks, sample by sample -------------------------------------------------------

Pair = TypeVar("Pair", bound=Callable[..., Tensor])
_INNER: dict[tuple[type, type], Callable[[Block, Block], Tensor]] = {}
_GRAM: dict[tuple[type, type], Callable[[Block, Block, Terms], Tensor]] = {}
_MATERIALISING = {(Conv, Conv), (Pulled, Pulled)}
"""Pairs registered for a block with itself; two different ones are materialised."""


def register_pair(table: dict, left: type, right: type) -> Callable[[Pair], Pair]:
    """Registers a fast form for a pair of block types in `_INNER` or `_GRAM`."""

    def add(function: Pair) -> Pair:
        table[left, right] = function
        return function

    return add


def has_pair_form(a: Block, b: Block) -> bool:
    """True where inner products of the two blocks need neither materialised."""
    types = {(type(a), type(b)), (type(b), type(a))}
    return bool(types & _INNER.keys()) and bool(types & _GRAM.keys()) and not types & _MATERIALISING


def inner(a: Block, b: Block) -> Float[Tensor, " batch"]:
    """Returns ⟨g_b, h_b⟩ for two blocks of the same batch and shape, [B]: the cross terms of tied weights."""
    if (type(a), type(b)) in _INNER:
        return _INNER[type(a), type(b)](a, b)
    if (type(b), type(a)) in _INNER:
        return _INNER[type(b), type(a)](b, a)
    return (real_rows(read_rows(a)) * real_rows(read_rows(b))).sum(1)


@singledispatch
def squared_norms(block: Block, terms: Terms | None = None) -> Float[Tensor, " batch"]:
    """Returns ‖g_b‖², [B]."""
    return real_rows(read_rows(block)).square().sum(1)


@squared_norms.register
def _(block: Outer, terms: Terms | None = None) -> Tensor:
    return outer.inner(block, block, terms)


@squared_norms.register
def _(block: Conv, terms: Terms | None = None) -> Tensor:
    return convolution.sqnorms(block.x, block.z, block.spec, terms)


@squared_norms.register
def _(block: Rows, terms: Terms | None = None) -> Tensor:
    return tables.inner(block, block)


@squared_norms.register
def _(block: Pulled, terms: Terms | None = None) -> Tensor:
    return squared_norms(block.inner, terms) if block.isometric else real_rows(read_rows(block)).square().sum(1)


@singledispatch
def squares_by_position(block: Block) -> Float[Tensor, " batch"] | None:
    """Returns Σ_t of the squares of what a row is the sum of, [B]; None for rows that are no sums."""
    return None


@squares_by_position.register
def _(block: Outer) -> Tensor | None:
    if block.x.shape[1] == 1:
        return None
    x, z = full_precision(block.x), full_precision(block.z)
    return torch.linalg.vecdot(x.square().sum(2), z.square().sum(2))


@squares_by_position.register
def _(block: Conv) -> Tensor:
    return convolution.squares_by_position(block.x, block.z, block.spec)


@squares_by_position.register
def _(block: Rows) -> Tensor:
    return full_precision(block.z).square().sum((1, 2))


@squares_by_position.register
def _(block: Pulled) -> Tensor | None:
    """Behind a map that changes lengths: what cancels before it does so after it, in the same proportion."""
    terms = squares_by_position(block.inner)
    if block.isometric or terms is None:
        return terms
    before, after = squared_norms(block.inner), squared_norms(block)
    return (terms * after / before).nan_to_num(0, 0, 0)


def gram(a: Block, b: Block | None = None, terms: Terms | None = None) -> Float[Tensor, "batch other"]:
    """Returns K_ij = ⟨g_i, h_j⟩, [B, B'], with h the rows of `b` or, without it, g itself."""
    b, terms = a if b is None else b, terms or Terms()
    if (type(a), type(b)) in _GRAM:
        return _GRAM[type(a), type(b)](a, b, terms)
    if (type(b), type(a)) in _GRAM:
        return _GRAM[type(b), type(a)](b, a, terms).T
    rows = real_rows(read_rows(a))
    return gram_of_rows(rows, None if b is a else real_rows(read_rows(b)))


register_pair(_INNER, Outer, Outer)(outer.inner)
register_pair(_GRAM, Outer, Outer)(outer.gram)
register_pair(_INNER, Rows, Rows)(tables.inner)
register_pair(_INNER, Rows, Outer)(tables.inner_with_outer)


@register_pair(_INNER, Conv, Conv)
def _(a: Conv, b: Conv) -> Tensor:
    return (read_rows(a) * read_rows(b)).flatten(1).sum(1)


@register_pair(_GRAM, Conv, Conv)
def _(a: Conv, b: Conv, terms: Terms) -> Tensor:
    if a.spec == b.spec and a.x.shape[1:] == b.x.shape[1:]:
        return convolution.gram(a.x, a.z, a.spec, None if a is b else (b.x, b.z), terms)
    return gram_of_rows(read_rows(a).flatten(1), read_rows(b).flatten(1))


@register_pair(_GRAM, Rows, Rows)
def _(a: Rows, b: Rows, terms: Terms) -> Tensor:
    return tables.gram(a, b)


@register_pair(_GRAM, Rows, Outer)
def _(a: Rows, b: Outer, terms: Terms) -> Tensor:
    terms.of_two = True
    return tables.gram_with_outer(a, b)


@register_pair(_INNER, Pulled, Pulled)
def _(a: Pulled, b: Pulled) -> Tensor:
    return (real_rows(read_rows(a)) * real_rows(read_rows(b))).sum(1)


@register_pair(_GRAM, Pulled, Pulled)
def _(a: Pulled, b: Pulled, terms: Terms) -> Tensor:
    if a is b and a.isometric:
        return gram(a.inner, terms=terms)
    return gram_of_rows(real_rows(read_rows(a)), real_rows(read_rows(b)))
