"""Per-sample weight gradients of convolutions: one equation, interchangeable algorithms.

For an input x [batch, in, *space] and an output gradient z [batch, out, *time] (time: the output positions),
the gradient of one sample is a sum over output positions of outer products with input patches,

    g_b = Σ_t z_bt ⊗ patch_bt        [out, in / groups, *kernel],

where patch_bt is what the kernel covers at position t. A transposed convolution is the same with x and z
exchanged: its weight gradient is that of the ordinary convolution that leads from its output back to its input.
So `ordinary` rewrites every problem as an ordinary one, and no algorithm below knows of transposition.

An algorithm takes x, z of one dtype (float32 or float64), batch ≥ 1, and a `ConvSpec` that is not transposed;
it returns [batch, *weight_shape], written into `out` where one is given. `ALGORITHMS` is the registry:

    fold       batch folded into groups, one convolution weight gradient (oneDNN on CPU, blocked for the cache)
    rows       the same after the first kernel axis has been unfolded into the input channels, padded to a multiple
               of 8: for inputs of few channels (images), for which oneDNN has no fast grouped kernel
    unfold     patches, then a batched matmul
    pointwise  a batched matmul without patches, for kernels of one element
    shift      a batched matmul per kernel element
    loop       one weight gradient per sample
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

_convolution_backward = torch.ops.aten.convolution_backward.default


@dataclass(frozen=True)
class ConvSpec:
    """Geometry of a convolution, as autograd's ConvolutionBackward0 saves it and aten.convolution takes it.

    weight_shape is as the module stores it: [out, in / groups, *kernel] or, transposed,
    [in, out / groups, *kernel].
    """

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.weight_shape[2:]


@dataclass(frozen=True)
class Algorithm:
    """One way to compute per-sample weight gradients: `compute(x, z, spec, out)`, where `supports(spec)`.

    temporary: what it allocates for every sample, so that the caller can split the batch to stay in the cache.
    """

    compute: Callable[[Tensor, Tensor, ConvSpec, Tensor | None], Tensor]
    supports: Callable[[ConvSpec], bool]
    temporary: Literal["result", "columns", "nothing"]


def ordinary(x: Tensor, z: Tensor, spec: ConvSpec) -> tuple[Tensor, Tensor, ConvSpec]:
    """(x, z, spec) of an ordinary convolution with the same weight gradient, in the dtype to accumulate in.

    Detached: saved tensors belong to a graph, and `out=` is refused where autograd records.
    """
    dtype = torch.promote_types(x.dtype, z.dtype)
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    x, z = x.detach().to(dtype), z.detach().to(dtype)
    if not spec.transposed:
        return x, z, spec
    x, z = z, x
    padding = spec.padding
    if any(extra >= stride for extra, stride in zip(spec.output_padding, spec.stride, strict=True)):
        # With output_padding ≥ stride (allowed up to the dilation) the ordinary convolution would have
        # positions that the transposed one does not: fix the extent by padding (and cropping) by hand.
        pads: list[int] = []
        for axis in reversed(range(len(padding))):
            reach = spec.dilation[axis] * (spec.kernel[axis] - 1) + 1
            extent = (z.shape[2 + axis] - 1) * spec.stride[axis] + reach
            pads += [padding[axis], extent - x.shape[2 + axis] - padding[axis]]
        x, padding = F.pad(x, pads), (0,) * len(padding)
    return x, z, replace(spec, padding=padding, transposed=False, output_padding=(0,) * len(padding))


def weight_gradient(x: Tensor, z: Tensor, spec: ConvSpec) -> Tensor:
    """The weight gradient summed over the batch, [*weight_shape]: one call that computes nothing else."""
    # Only its shape is read. Not expanded from one element: that would be copied in full.
    weight = x.new_empty(spec.weight_shape)
    return _convolution_backward(
        z, x, weight, None, spec.stride, spec.padding, spec.dilation,
        spec.transposed, spec.output_padding, spec.groups, [False, True, False],
    )[1]  # fmt: skip


def pad(x: Tensor, spec: ConvSpec) -> Tensor:
    """The input with its padding written out."""
    return F.pad(x, [amount for amount in reversed(spec.padding) for _ in range(2)]) if any(spec.padding) else x


def patches(x: Tensor, spec: ConvSpec, time: tuple[int, ...]) -> Tensor:
    """View [batch, in, *kernel, *time] of the padded input: what each kernel element meets at each position."""
    x = pad(x, spec)
    steps = x.stride()[2:]
    return x.as_strided(
        (*x.shape[:2], *spec.kernel, *time),
        (
            *x.stride()[:2],
            *(step * dilation for step, dilation in zip(steps, spec.dilation, strict=True)),
            *(step * stride for step, stride in zip(steps, spec.stride, strict=True)),
        ),
        x.storage_offset(),
    )


def _fold(x: Tensor, z: Tensor, spec: ConvSpec, out: Tensor | None) -> Tensor:
    batch = x.shape[0]
    folded = replace(
        spec, weight_shape=(batch * spec.weight_shape[0], *spec.weight_shape[1:]), groups=batch * spec.groups
    )
    # Flattened, then viewed: strides of axes of size one may look like channels last, which not every kernel takes.
    grads = weight_gradient(x.reshape(-1).view(1, -1, *x.shape[2:]), z.reshape(-1).view(1, -1, *z.shape[2:]), folded)
    return _store(grads.reshape(batch, *spec.weight_shape), out)


def _loop(x: Tensor, z: Tensor, spec: ConvSpec, out: Tensor | None) -> Tensor:
    if out is None:
        out = x.new_empty(x.shape[0], *spec.weight_shape)
    for row, x_b, z_b in zip(out, x.split(1), z.split(1), strict=True):
        row.copy_(weight_gradient(x_b, z_b, spec))
    return out


def _pointwise(x: Tensor, z: Tensor, spec: ConvSpec, out: Tensor | None) -> Tensor:
    x = x[
        (
            slice(None),
            slice(None),
            *(slice(None, (n - 1) * s + 1, s) for n, s in zip(z.shape[2:], spec.stride, strict=True)),
        )
    ]
    return _contract(x, z, spec, out)


def _unfold(x: Tensor, z: Tensor, spec: ConvSpec, out: Tensor | None) -> Tensor:
    return _contract(patches(x, spec, tuple(z.shape[2:])), z, spec, out)


def _shift(x: Tensor, z: Tensor, spec: ConvSpec, out: Tensor | None) -> Tensor:
    if out is None:
        out = x.new_empty(x.shape[0], *spec.weight_shape)
    covered = patches(x, spec, tuple(z.shape[2:]))
    single = replace(spec, weight_shape=spec.weight_shape[:2])
    z = z.contiguous()
    for element in product(*map(range, spec.kernel)):
        index: list[slice | int] = [slice(None), slice(None), *element]
        _contract(covered[tuple(index)], z, single, out[(slice(None), *index)])
    return out


def _rows(x: Tensor, z: Tensor, spec: ConvSpec, out: Tensor | None) -> Tensor:
    size, rest = spec.kernel[0], spec.kernel[1:]
    padded = F.pad(x, [0, 0] * len(rest) + [spec.padding[0]] * 2)
    step = padded.stride()
    covered = padded.as_strided(
        (x.shape[0], spec.groups, spec.weight_shape[1], size, z.shape[2], *x.shape[3:]),
        (step[0], spec.weight_shape[1] * step[1], step[1], spec.dilation[0] * step[2], spec.stride[0] * step[2])
        + step[3:],
        padded.storage_offset(),
    )
    used = spec.weight_shape[1] * size
    channels = -(-used // 8) * 8
    wide = x.new_empty(x.shape[0], spec.groups, channels, *covered.shape[4:])
    wide[:, :, used:] = 0.0
    wide[:, :, :used].unflatten(2, (-1, size)).copy_(covered)
    unfolded = replace(
        spec,
        weight_shape=(spec.weight_shape[0], channels, 1, *rest),
        stride=(1, *spec.stride[1:]),
        padding=(0, *spec.padding[1:]),
        dilation=(1, *spec.dilation[1:]),
    )
    grads = _fold(wide.flatten(1, 2), z, unfolded, None)[:, :, :used]
    return _store(grads.reshape(x.shape[0], *spec.weight_shape), out)


def _contract(columns: Tensor, z: Tensor, spec: ConvSpec, out: Tensor | None) -> Tensor:
    """Σ_t z[b, o, t] columns[b, i, k, t] within each group, as one batched matmul."""
    batch, groups = z.shape[0], spec.groups
    left = z.reshape(batch * groups, z.shape[1] // groups, -1)
    right = columns.reshape(batch * groups, -1, left.shape[2]).mT
    if out is not None and out.is_contiguous():
        torch.bmm(left, right, out=out.view(batch * groups, left.shape[1], -1))
        return out
    return _store(torch.bmm(left, right).view(batch, *spec.weight_shape), out)


def _store(grads: Tensor, out: Tensor | None) -> Tensor:
    return grads if out is None else out.copy_(grads)


def _always(spec: ConvSpec) -> bool:
    return True


def _is_pointwise(spec: ConvSpec) -> bool:
    return math.prod(spec.kernel) == 1 and not any(spec.padding)


ALGORITHMS: dict[str, Algorithm] = {
    "fold": Algorithm(_fold, _always, "result"),
    "loop": Algorithm(_loop, _always, "nothing"),
    "pointwise": Algorithm(_pointwise, _is_pointwise, "nothing"),
    "rows": Algorithm(_rows, _always, "result"),
    "shift": Algorithm(_shift, _always, "nothing"),
    "unfold": Algorithm(_unfold, _always, "columns"),
}
