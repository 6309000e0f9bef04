"""Which algorithm, which form of the Gram matrix, and how large a part of the batch at a time."""

import math

import torch
from torch import Tensor

from persample.blocks.convolution.algorithms import ALGORITHMS, ConvSpec, ordinary
from persample.blocks.kernels import FORMS, forced_among

BUDGET = 64 * 2**20  # bytes of temporary memory in gram and sqnorms
CACHE = 4 * 2**20  # bytes that the parts of a batch may touch: about what stays in the cache of a few cores


FEW = 4096
"""Entries of a sample's patches up to which these cost less than what oneDNN does before it starts."""


def choose(x: Tensor, z: Tensor, spec: ConvSpec) -> str:
    """The name of the algorithm that per_sample_grads uses.

    An analytic rule, not a measurement at run time: on a shared machine single measurements were off by up to
    ten times, far more than the algorithms differ, so a cache would have kept wrong choices for good. Measured
    on two CPU cores (float32, AVX-512), in units of the summed weight gradient: `fold`, a cache-sized part of
    the batch at a time, costs 0.9 to 1.3 for most layers, because oneDNN's convolutions run at twice the speed
    of a batched matmul. The others win where the gradients of one sample are larger than the data they come
    from (few positions, many channels), where patches do not overlap or are few, and (`rows`) for images.
    """
    x, z, spec = ordinary(x, z, spec)
    forced = forced_among(ALGORITHMS)
    if forced is not None:
        return forced
    batch = max(1, x.shape[0])
    result, data = math.prod(spec.weight_shape), (x.numel() + z.numel()) // batch
    inp, out = spec.weight_shape[1], spec.weight_shape[0] // spec.groups
    if ALGORITHMS["pointwise"].supports(spec):
        return "pointwise" if result > data or x.dtype != torch.float32 else "fold"
    if inp == out == 1:
        return "fold"
    disjoint = all(stride >= size for stride, size in zip(spec.stride, spec.kernel, strict=True))
    if disjoint or result * x.element_size() > CACHE:
        return "unfold"
    if x.is_cpu and result * math.prod(z.shape[2:]) <= FEW * out * spec.groups:
        return "unfold"
    if inp % 8 and inp < 32 and out >= 8 and x.dtype == torch.float32:
        return "rows"
    return "fold"


def choose_form(x: Tensor, z: Tensor, spec: ConvSpec, others: float | None) -> str:
    """Which form of the Gram matrix or of its diagonal (None) needs fewer operations.

    others: with how many samples each is paired: batch', or half the batch where the matrix is symmetric.
    """
    forced = forced_among(FORMS)
    if forced is not None:
        return forced
    if not z.is_cpu:
        return "materialise"
    time, out = math.prod(z.shape[2:]), z.shape[1] // spec.groups
    rows = out * math.prod(spec.weight_shape[1:])
    materialise = time * rows + (0 if others is None else others * rows)
    hadamard = (1 if others is None else others) * (time**2 * out + min(product_costs(x, spec, tuple(z.shape[2:]))))
    return "hadamard" if hadamard < materialise else "materialise"


def gram_form(x: Tensor, z: Tensor, spec: ConvSpec) -> str:
    """Which form of the symmetric Gram matrix of a batch needs fewer operations."""
    return choose_form(*ordinary(x, z, spec), x.shape[0] / 2)


def product_costs(x: Tensor, spec: ConvSpec, time: tuple[int, ...]) -> tuple[int, int]:
    """Operations for the products of the patches of one pair of samples: from pixels, from patches."""
    pixels, positions = math.prod(x.shape[2:]), math.prod(time)
    size, added = pixels, 0
    for axis in reversed(range(len(time))):  # the products shrink, or grow, from one axis to the next
        size = size // x.shape[2 + axis] * time[axis]
        added += spec.kernel[axis] * size**2
    # Adding costs about eight times what a multiplication inside a matmul does: it is bound by memory.
    elements = math.prod(spec.kernel)
    return pixels**2 * spec.weight_shape[1] + 8 * added, positions**2 * spec.weight_shape[1] * elements


def ranges(size: int, bytes_each: int, budget: int, multiple: int = 1) -> list[slice]:
    """range(size) in equal parts of at most `budget` bytes, of a multiple of `multiple` where that fits."""
    most = max(1, budget // max(1, bytes_each))
    step = -(-size // -(-size // most)) if size else 1
    if step < size and most >= multiple:
        step = min(-(-step // multiple) * multiple, most // multiple * multiple)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
