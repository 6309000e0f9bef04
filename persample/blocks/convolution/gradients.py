"""Per-sample convolution gradients, and their weighted sum, Gram matrix and norms.

With x [batch, in, *space], z [batch, out, *time] and g_b = Σ_t z_bt ⊗ patch_bt (`convolution_algorithms`):

    weighted_grad      Σ_b c_b g_b                                       [*weight_shape]
    per_sample_grads   g_b                                               [batch, *weight_shape]
    gram               K_ab = ⟨g_a, g_b⟩                                 [batch, batch']
                       = Σ_{t,s} (z_at·z_bs) (patch_at·patch_bs)         (the Hadamard form)
    sqnorms            K_bb                                              [batch]

All are exact. float16 and bfloat16 inputs are accumulated, and returned, in float32. The Hadamard form loses digits
where positions cancel (`persample.blocks.cancellation`); where looking at its result would halt the host, rows are
formed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from persample import memory
from persample.blocks.cancellation import Terms
from persample.blocks.convolution.algorithms import ALGORITHMS, ConvSpec, ordinary, patches, weight_gradient
from persample.blocks.convolution.choice import BUDGET, CACHE, choose, choose_form, product_costs, ranges
from persample.blocks.products import LONGEST, gram_of_rows
from persample.memory import workspace
from persample.memory.workspace import scaled

__all__ = ["ConvSpec", "choose", "gram", "per_sample_grads", "sqnorms", "weighted_grad"]

PIECE = 2 * 2**20
"""Bytes of x or z that are scaled at a time: about what stays in the cache of one core."""

Pair = tuple[Tensor, Tensor]


def weighted_grad(x: Tensor, z: Tensor, spec: ConvSpec, c: Tensor | None = None) -> Tensor:
    """Σ_b c_b g_b, shape [*weight_shape], at the cost of one weight gradient (c: [batch], default ones)."""
    x, z, spec = ordinary(x, z, spec)
    if not x.shape[0]:
        return x.new_zeros(spec.weight_shape)
    if c is None:
        return weight_gradient(x, z, spec)
    return summing(x, z, spec)(x, z, c.to(x.dtype))


def summing(x: Tensor, z: Tensor, spec: ConvSpec) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Returns (x, z, c) → Σ_b c_b g_b for ordinary convolutions of these shapes, which are all that decides how.

    The sum is linear in x and in z, so the smaller of them is scaled.
    """
    narrow, number = x.numel() < z.numel(), pieces(x, z, spec)

    def piece(x: Tensor, z: Tensor, c: Tensor) -> Tensor:
        return weight_gradient(scaled(x, c), z, spec) if narrow else weight_gradient(x, scaled(z, c), spec)

    if number == 1:
        return piece
    size = -(-x.shape[0] // number)

    def total(x: Tensor, z: Tensor, c: Tensor) -> Tensor:
        parts = zip(x.split(size), z.split(size), c.split(size), strict=True)
        result = piece(*next(parts))
        for part in parts:
            result += piece(*part)
        return result

    return total


def pieces(x: Tensor, z: Tensor, spec: ConvSpec) -> int:
    """In how many pieces to scale and sum the batch, so that what is scaled, and copied, stays in the cache.

    Measured for 16 channels of 32 × 32 pixels, 128 samples, on two cores and on one, in milliseconds: a weight gradient
    6.9 and 9.8; with z scaled 7.4 and 12.0 in one piece, 4.2 and 6.8 in four, because what oneDNN copies for itself
    is fresh memory, too. With an allocator that keeps memory 3.7, 4.3, 4.2 and 5.0, 5.8, 5.8. Below 8 MiB one piece
    is faster, and where the weight is not small beside a piece: it is added once for each.
    """
    size = min(x.nbytes, z.nbytes)
    if size < 4 * PIECE or 32 * math.prod(spec.weight_shape) * x.element_size() > PIECE or x.device.type != "cpu":
        return 1
    return min(x.shape[0], size // PIECE)


def per_sample_grads(
    x: Tensor,
    z: Tensor,
    spec: ConvSpec,
    algorithm: str | None = None,
    out: Tensor | None = None,
    empty: Callable[[Sequence[int], Tensor], Tensor] = memory.empty,
) -> Tensor:
    """The weight gradient of each sample, [batch, *weight_shape].

    algorithm: a name of `ALGORITHMS`; default: what `choose` says. out: written to and returned where given.
    empty: (shape, like) → memory to write to otherwise, where an algorithm does not bring its own.
    Raises ValueError if the algorithm is unknown or cannot handle the convolution.
    """
    x, z, spec = ordinary(x, z, spec)
    if algorithm is None:
        algorithm = choose(x, z, spec)
    able = [name for name in ALGORITHMS if ALGORITHMS[name].supports(spec)]
    if algorithm not in able:
        raise ValueError(f"algorithm {algorithm!r} cannot be used for {spec}; choose one of {able}")
    if not x.shape[0]:
        return x.new_zeros(0, *spec.weight_shape) if out is None else out
    batch, chosen = x.shape[0], ALGORITHMS[algorithm]
    result = math.prod(spec.weight_shape)
    columns = spec.groups * math.prod(spec.weight_shape[1:]) * math.prod(z.shape[2:])
    temporary = {"result": result, "columns": columns, "nothing": 0}[chosen.temporary]
    elements = (x.numel() + z.numel()) // batch + temporary
    parts = ranges(batch, elements * x.element_size(), CACHE)
    if out is None and (chosen.temporary != "result" or len(parts) > 1):
        out = empty((batch, *spec.weight_shape), x)
    if out is None or chosen.temporary == "nothing" or len(parts) == 1:
        return chosen.compute(x, z, spec, out)
    # In parts whose temporaries stay in the cache, and come from memory that has been touched before: oneDNN
    # works in layouts of its own, and for 64 → 64 channels the batch at once took three times as long.
    for part in parts:
        chosen.compute(x[part], z[part], spec, out[part])
    return out


def gram(
    x: Tensor, z: Tensor, spec: ConvSpec, other: tuple[Tensor, Tensor] | None = None, terms: Terms | None = None
) -> Tensor:
    """Inner products of per-sample weight gradients, [batch, batch'], with themselves or with those of `other`.

    other: (x', z') of the same convolution. The form is chosen by cost; see `choose_form`. terms: gets what the
    Hadamard form adds up.
    """
    x, z, ordinary_spec = ordinary(x, z, spec)
    x2, z2 = (x, z) if other is None else ordinary(*other, spec)[:2]
    result = x.new_zeros(x.shape[0], x2.shape[0])
    first, second = (x, z), None if other is None else (x2, z2)
    if not result.numel():
        return result
    if choose_form(x, z, ordinary_spec, x2.shape[0] / (2 if other is None else 1)) == "hadamard":
        _add_hadamard(result, first, second, ordinary_spec, terms or Terms())
    else:
        _add_materialised(result, first, second, ordinary_spec)
    return result


def sqnorms(x: Tensor, z: Tensor, spec: ConvSpec, terms: Terms | None = None) -> Tensor:
    """Squared norms of the per-sample weight gradients, [batch]; `terms` gets what they are sums of."""
    x, z, spec = ordinary(x, z, spec)
    result = x.new_empty(x.shape[0])
    if not x.shape[0]:
        return result
    diagonals = torch.empty_like(result)
    hadamard = choose_form(x, z, spec, None) == "hadamard"
    time, pixels = math.prod(z.shape[2:]), math.prod(x.shape[2:])
    per_sample = spec.groups * (2 * time**2 + pixels**2) if hadamard else math.prod(spec.weight_shape)
    for part in ranges(x.shape[0], per_sample * x.element_size(), 2 * CACHE):
        if hadamard:
            rows = z[part].reshape(-1, z.shape[1] // spec.groups, time)
            images = x[part].reshape(-1, spec.weight_shape[1], *x.shape[2:])
            products = _position_products(images, None, spec, tuple(z.shape[2:]))
            products *= torch.bmm(rows.mT, rows).view_as(products)
            result[part] = products.flatten(1).sum(1).view(-1, spec.groups).sum(1)
            own = products.view(-1, time, time).diagonal(dim1=1, dim2=2)
            diagonals[part] = own.sum(1).view(-1, spec.groups).sum(1)
        else:
            grads = per_sample_grads(x[part], z[part], spec, empty=workspace.empty).flatten(1)
            # Not vector_norm: it adds one after the other in float32, 1e-4 off for 2^21 elements; sum is pairwise.
            result[part] = grads.square_().sum(1)
    if terms is not None and hadamard:
        terms.add(diagonals)
    return result


def squares_by_position(x: Tensor, z: Tensor, spec: ConvSpec) -> Tensor:
    """Σ_t ‖z_bt‖² ‖patch_bt‖², [batch]: the squares of pixels, added up over channels, then by a kernel of ones."""
    x, z, spec = ordinary(x, z, spec)
    if not x.shape[0]:
        return x.new_zeros(0)
    per_sample = (x.numel() + z.numel()) // x.shape[0] * x.element_size()
    return torch.cat([_squares_by_position(x[s], z[s], spec) for s in ranges(x.shape[0], per_sample, CACHE)])


def _squares_by_position(x: Tensor, z: Tensor, spec: ConvSpec) -> Tensor:
    pixels = x.unflatten(1, (spec.groups, -1)).square().sum(2).flatten(0, 1).unsqueeze(1)
    positions = z.unflatten(1, (spec.groups, -1)).square().sum(2)
    ones, nothing = x.new_ones(1, 1, *spec.kernel), [0] * len(spec.kernel)
    covered = torch.convolution(pixels, ones, None, spec.stride, spec.padding, spec.dilation, False, nothing, 1)
    # the ordinary form of a transposed convolution may have positions at its end that nothing came from
    for axis, size in enumerate(positions.shape[2:], 2):
        covered = covered.narrow(axis, 0, size)
    return (covered.reshape(positions.shape) * positions).flatten(1).sum(1)


def _position_products(x: Tensor, other: Tensor | None, spec: ConvSpec, time: tuple[int, ...]) -> Tensor:
    """patch_at·patch_bs for every pair of samples, [batch, *time, batch', *time]; other None: each with itself.

    From pixels: patch_t·patch_s = Σ_k x_{t+k}·x_{s+k}, so the kernel's elements are added after the product of
    the images, which takes as many times fewer multiplications as the kernel has elements; and one axis of the
    kernel after the other, so that 3 × 3 elements take 3 + 3 additions. Padding is zeros, which are left out.
    """
    positions = math.prod(time)
    from_pixels, from_patches = product_costs(x, spec, time)
    if from_patches < from_pixels:
        others = () if other is None else (other.shape[0],)
        left = patches(x, spec, time).reshape(x.shape[0], -1, positions)
        right = None if other is None else patches(other, spec, time).reshape(other.shape[0], -1, positions)
        return _pair_products(left, right).view(x.shape[0], *time, *others, *time)
    products = _pair_products(x.flatten(2), None if other is None else other.flatten(2))
    products = products.view(x.shape[0], *x.shape[2:], 1 if other is None else other.shape[0], *x.shape[2:])
    dims = len(time)
    for axis in reversed(range(dims)):
        products = _diagonal_sums(products, spec, axis, time[axis], (1 + axis, 2 + dims + axis))
    return products.squeeze(1 + dims) if other is None else products


def _diagonal_sums(products: Tensor, spec: ConvSpec, axis: int, time: int, dims: tuple[int, int]) -> Tensor:
    """Σ_k products[s t + d k - p, s t' + d k - p] for t, t' in range(time), along two dimensions, zero outside."""
    stride, padding, size = spec.stride[axis], spec.padding[axis], products.shape[dims[0]]
    shape = list(products.shape)
    shape[dims[0]] = shape[dims[1]] = time
    total = products.new_zeros(shape)
    for element in range(spec.kernel[axis]):
        offset = element * spec.dilation[axis] - padding
        first = max(0, -(offset // stride))
        last = min(time - 1, (size - 1 - offset) // stride)
        if last < first:
            continue
        target, source = total, products
        for dim in dims:
            target = target.narrow(dim, first, last - first + 1)
            begin = first * stride + offset
            source = source.narrow(dim, begin, (last - first) * stride + 1)
            source = source[(slice(None),) * dim + (slice(None, None, stride),)]
        target += source
    return total


def _pair_products(left: Tensor, right: Tensor | None) -> Tensor:
    """[batch, time, batch', time'] from columns [batch, channels, time]; right None: [batch, time, time]."""
    if right is None:
        return torch.bmm(left.mT, left)
    channels = left.shape[1]
    return left.mT.reshape(-1, channels) @ right.mT.reshape(-1, channels).mT


def _add_hadamard(result: Tensor, first: Pair, second: Pair | None, spec: ConvSpec, terms: Terms) -> None:
    (x, z), (x2, z2) = first, second or first
    shape, time = tuple(z.shape[2:]), math.prod(z.shape[2:])
    x, z, x2, z2 = (t.unflatten(1, (spec.groups, -1)) for t in (x, z, x2, z2))
    per_sample = x2.shape[0] * (2 * time**2 + math.prod(x.shape[3:]) ** 2) * result.element_size()
    # A symmetric matrix in four rows of blocks at least: what is mirrored is left out.
    budget = BUDGET if second else min(BUDGET, -(-result.shape[0] // 4) * per_sample)
    diagonals, terms.of_two = result.new_zeros(result.shape[0]), terms.of_two or second is not None
    for group in range(spec.groups):
        for part in ranges(result.shape[0], per_sample, budget):
            end = z2.shape[0] if second else part.stop  # beyond it: mirrored
            products = _position_products(x[part, group], x2[:end, group], spec, shape)
            products *= _pair_products(z[part, group].flatten(2), z2[:end, group].flatten(2)).view_as(products)
            block = products.view(-1, time, end, time).sum((1, 3))
            result[part, :end] += block
            if not second:
                result[: part.start, part] += block[:, : part.start].mT
                own = products.view(-1, end * time).diagonal(part.start * time)  # of positions, each with itself
                diagonals[part] += own.view(-1, time).sum(1)
    if not second:
        terms.add(diagonals)


def _add_materialised(result: Tensor, first: Pair, second: Pair | None, spec: ConvSpec) -> None:
    out = spec.weight_shape[0] // spec.groups
    both = result.shape[0] + (0 if second is None else result.shape[1])
    per_channel = both * math.prod(spec.weight_shape[1:]) * result.element_size()
    budget = min(BUDGET // 4, both * LONGEST * result.element_size())
    # Whole groups together while they fit, otherwise some of the output channels of one group.
    for group in ranges(spec.groups, per_channel * out, budget):
        for part in ranges(out, per_channel * (group.stop - group.start), budget, 16):
            columns = None if second is None else _partial_grads(*second, spec, group, part, memory.empty)
            result += gram_of_rows(_partial_grads(*first, spec, group, part, workspace.empty), columns)


def _partial_grads(
    x: Tensor, z: Tensor, spec: ConvSpec, group: slice, part: slice, empty: Callable[[Sequence[int], Tensor], Tensor]
) -> Tensor:
    groups, out = group.stop - group.start, part.stop - part.start
    x = x.unflatten(1, (spec.groups, -1))[:, group].flatten(1, 2)
    z = z.unflatten(1, (spec.groups, -1))[:, group, part].flatten(1, 2)
    partial = replace(spec, weight_shape=(groups * out, *spec.weight_shape[1:]), groups=groups)
    return per_sample_grads(x, z, partial, empty=empty).flatten(1)
