"""Per-sample weight gradients of convolutions: one equation, interchangeable algorithms.

For an input x [batch, in, *space] and an output gradient z [batch, out, *time] (time: the output positions), the
gradient of one sample is a sum over output positions of outer products with input patches,

    g_b = Σ_t z_bt ⊗ patch_bt        [out, in / groups, *kernel],

where patch_bt is what the kernel covers at position t. A transposed convolution is the same with x and z exchanged:
its weight gradient is that of the ordinary convolution that leads from its output back to its input. So
`ordinary` rewrites every problem as an ordinary one, and each algorithm below knows nothing of transposition.

An algorithm takes x, z of one floating dtype (float32 or float64) with batch ≥ 1 and a `ConvSpec` that is not transposed, and returns
[batch, *weight_shape], written into `out` where one is given. `ALGORITHMS` is the registry.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

_convolution_backward = torch.ops.aten.convolution_backward


@dataclass(frozen=True)
class ConvSpec:
    """Geometry of a convolution, as autograd's ConvolutionBackward0 saves it and aten.convolution takes it.

    weight_shape is as the module stores it: [out, in / groups, *kernel], transposed [in, out / groups, *kernel].
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
    """One way to compute per-sample weight gradients: `compute(x, z, spec, out)`, where `supports(spec)`."""

    compute: Callable[[Tensor, Tensor, ConvSpec, Tensor | None], Tensor]
    supports: Callable[[ConvSpec], bool]


def ordinary(x: Tensor, z: Tensor, spec: ConvSpec) -> tuple[Tensor, Tensor, ConvSpec]:
    """(x, z, spec) of an ordinary convolution with the same weight gradient, in the dtype to accumulate in."""
    dtype = torch.promote_types(x.dtype, z.dtype)
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    x, z = x.to(dtype), z.to(dtype)
    if not spec.transposed:
        return x, z, spec
    x, z = z, x
    padding = spec.padding
    if any(extra >= stride for extra, stride in zip(spec.output_padding, spec.stride, strict=True)):
        # With output_padding ≥ stride (allowed up to the dilation) the ordinary convolution would have positions
        # that the transposed one does not: fix the extent by padding (and cropping) by hand.
        pads: list[int] = []
        for axis in reversed(range(len(padding))):
            extent = (
                (z.shape[2 + axis] - 1) * spec.stride[axis]
                + spec.dilation[axis] * (spec.kernel[axis] - 1)
                + 1
            )
            pads += [padding[axis], extent - x.shape[2 + axis] - padding[axis]]
        x, padding = F.pad(x, pads), (0,) * len(padding)
    return x, z, replace(spec, padding=padding, transposed=False, output_padding=(0,) * len(padding))


def weight_gradient(x: Tensor, z: Tensor, spec: ConvSpec) -> Tensor:
    """The weight gradient summed over the batch, [*weight_shape]: one call that computes nothing else."""
    # Only the shape of the weight is read: expanding a single element allocates nothing.
    weight = x.new_empty(1).expand(spec.weight_shape)
    return _convolution_backward(
        z, x, weight, None, spec.stride, spec.padding, spec.dilation,
        spec.transposed, spec.output_padding, spec.groups, [False, True, False],
    )[1]  # fmt: skip


def patches(x: Tensor, spec: ConvSpec, time: tuple[int, ...]) -> Tensor:
    """View [batch, in, *kernel, *time] of the (padded) input: what each kernel element meets at each position."""
    if any(spec.padding):
        x = F.pad(x, [pad for pad in reversed(spec.padding) for _ in range(2)])
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
    grads = weight_gradient(x.reshape(1, -1, *x.shape[2:]), z.reshape(1, -1, *z.shape[2:]), folded)
    return _store(grads.reshape(batch, *spec.weight_shape), out)


def _loop(x: Tensor, z: Tensor, spec: ConvSpec, out: Tensor | None) -> Tensor:
    if out is None:
        out = x.new_empty(x.shape[0], *spec.weight_shape)
    for row, x_b, z_b in zip(out, x.split(1), z.split(1), strict=True):
        row.copy_(weight_gradient(x_b, z_b, spec))
    return out


def _pointwise(x: Tensor, z: Tensor, spec: ConvSpec, out: Tensor | None) -> Tensor:
    x = x[(..., *(slice(None, (n - 1) * s + 1, s) for n, s in zip(z.shape[2:], spec.stride, strict=True)))]
    return _contract(x, z, spec, out)


def _unfold(x: Tensor, z: Tensor, spec: ConvSpec, out: Tensor | None) -> Tensor:
    return _contract(patches(x, spec, tuple(z.shape[2:])), z, spec, out)


def _shift(x: Tensor, z: Tensor, spec: ConvSpec, out: Tensor | None) -> Tensor:
    if out is None:
        out = x.new_empty(x.shape[0], *spec.weight_shape)
    covered = patches(x, spec, tuple(z.shape[2:]))
    columns = out.flatten(3)
    single = replace(spec, weight_shape=spec.weight_shape[:2] + (1,) * len(spec.kernel))
    z = z.contiguous()
    for position in range(math.prod(spec.kernel)):
        index: list[int] = []
        for size in reversed(spec.kernel):
            position, remainder = divmod(position, size)
            index.insert(0, remainder)
        out[(..., *index)] = _contract(covered[(slice(None), slice(None), *index)], z, single, None)[
            (..., *(0 for _ in index))
        ]
    del columns
    return out


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
    "fold": Algorithm(_fold, _always),
    "loop": Algorithm(_loop, _always),
    "pointwise": Algorithm(_pointwise, _is_pointwise),
    "shift": Algorithm(_shift, _always),
    "unfold": Algorithm(_unfold, _always),
}
