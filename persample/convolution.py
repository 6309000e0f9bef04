"""Reductions of per-sample convolution gradients: weighted sum, the gradients, their Gram matrix, their norms.

With x [batch, in, *space], z [batch, out, *time] and g_b = Σ_t z_bt ⊗ patch_bt (see `convolution_algorithms`):

    weighted_grad      Σ_b c_b g_b                                       [*weight_shape]
    per_sample_grads   g_b                                               [batch, *weight_shape]
    gram               K_ab = ⟨g_a, g_b⟩                                 [batch, batch']
                       = Σ_{t,s} (z_at·z_bs) (patch_at·patch_bs)         (the Hadamard form)
    sqnorms            K_bb                                              [batch]

All are exact. float16 and bfloat16 inputs are accumulated, and returned, in float32.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from persample.convolution_algorithms import ALGORITHMS, ConvSpec, ordinary, patches, weight_gradient

__all__ = ["ConvSpec", "choose", "force", "gram", "per_sample_grads", "sqnorms", "weighted_grad"]

_BUDGET = 64 * 2**20  # bytes of temporary memory in gram and sqnorms
_forced: list[str] = []


@contextmanager
def force(name: str) -> Iterator[None]:
    """Within the context every choice of an algorithm, in the whole process, is `name`.

    For gram and sqnorms the names are "materialise" and "hadamard"; both kinds of choice can be forced together.
    Raises ValueError if there is no such name.
    """
    if name not in ALGORITHMS and name not in _FORMS:
        raise ValueError(f"no algorithm is called {name!r}; choose one of {sorted([*ALGORITHMS, *_FORMS])}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.remove(name)


def _forced_among(names: object) -> str | None:
    return next((name for name in reversed(_forced) if name in names), None)  # type: ignore[operator]


def choose(x: Tensor, z: Tensor, spec: ConvSpec) -> str:
    """The name of the algorithm that per_sample_grads uses."""
    _, _, spec = ordinary(x[:0], z[:0], spec)
    forced = _forced_among(ALGORITHMS)
    if forced is not None:
        return forced
    return "pointwise" if ALGORITHMS["pointwise"].supports(spec) else "fold"


def weighted_grad(x: Tensor, z: Tensor, spec: ConvSpec, c: Tensor | None = None) -> Tensor:
    """Σ_b c_b g_b, shape [*weight_shape], at the cost of one ordinary weight gradient (c: [batch], default ones)."""
    x, z, spec = ordinary(x, z, spec)
    if not x.shape[0]:
        return x.new_zeros(spec.weight_shape)
    if c is not None:
        # The sum is linear in x and in z: scale the smaller one.
        weights = c.to(x.dtype).view(-1, *(1 for _ in x.shape[1:]))
        x, z = (x * weights, z) if x.numel() < z.numel() else (x, z * weights)
    return weight_gradient(x, z, spec)


def per_sample_grads(
    x: Tensor, z: Tensor, spec: ConvSpec, algorithm: str | None = None, out: Tensor | None = None
) -> Tensor:
    """The weight gradient of each sample, [batch, *weight_shape].

    algorithm: a name of `ALGORITHMS`; default: what `choose` says. out: written to and returned where given.
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
    return ALGORITHMS[algorithm].compute(x, z, spec, out)


def gram(x: Tensor, z: Tensor, spec: ConvSpec, other: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Inner products of per-sample weight gradients, [batch, batch'], with themselves or with those of `other`.

    other: (x', z') of the same convolution. The form is chosen by cost; see `_form`.
    """
    x, z, ordinary_spec = ordinary(x, z, spec)
    x2, z2 = (x, z) if other is None else ordinary(*other, spec)[:2]
    form = _FORMS[_form(x, z, ordinary_spec, x2.shape[0])]
    result = x.new_zeros(x.shape[0], x2.shape[0])
    if result.numel():
        form(result, (x, z), None if other is None else (x2, z2), ordinary_spec)
    return result


def sqnorms(x: Tensor, z: Tensor, spec: ConvSpec) -> Tensor:
    """Squared norms of the per-sample weight gradients, [batch]."""
    x, z, spec = ordinary(x, z, spec)
    result = x.new_empty(x.shape[0])
    if not x.shape[0]:
        return result
    hadamard = _form(x, z, spec, 1) == "hadamard"
    time = math.prod(z.shape[2:])
    per_sample = (2 * spec.groups * time**2) if hadamard else math.prod(spec.weight_shape)
    for part in _ranges(x.shape[0], per_sample * x.element_size()):
        if hadamard:
            left, right = _columns(x[part], z[part], spec)
            result[part] = ((left @ left.mT) * (right @ right.mT)).sum((1, 2, 3))
        else:
            result[part] = per_sample_grads(x[part], z[part], spec).flatten(1).square().sum(1)
    return result


def _form(x: Tensor, z: Tensor, spec: ConvSpec, others: int) -> str:
    """Which form of the Gram matrix needs fewer operations."""
    forced = _forced_among(_FORMS)
    if forced is not None:
        return forced
    batch, time = z.shape[0], math.prod(z.shape[2:])
    out, inp = z.shape[1] // spec.groups, math.prod(spec.weight_shape[1:])
    materialise = batch * time * out * inp + batch * others * out * inp
    hadamard = batch * others * time**2 * (out + inp)
    return "hadamard" if hadamard < materialise else "materialise"


def _columns(x: Tensor, z: Tensor, spec: ConvSpec) -> tuple[Tensor, Tensor]:
    """(z, patches) as [batch, groups, time, out] and [batch, groups, time, inp]."""
    batch, groups = x.shape[0], spec.groups
    left = z.reshape(batch, groups, z.shape[1] // groups, -1)
    right = patches(x, spec, tuple(z.shape[2:])).reshape(batch, groups, -1, left.shape[-1])
    return left.mT, right.mT


def _ranges(size: int, bytes_each: int) -> list[slice]:
    step = max(1, _BUDGET // max(1, bytes_each))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _add_hadamard(
    result: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor] | None, spec: ConvSpec
) -> None:
    left, right = _columns(*first, spec)
    left2, right2 = (left, right) if second is None else _columns(*second, spec)
    others, time = left2.shape[0], left.shape[2]
    for group in range(spec.groups):
        l2, r2 = left2[:, group].reshape(others * time, -1).mT, right2[:, group].reshape(others * time, -1).mT
        for part in _ranges(result.shape[0], 2 * time**2 * others * result.element_size()):
            products = left[part, group].reshape(-1, l2.shape[0]) @ l2
            products *= right[part, group].reshape(-1, r2.shape[0]) @ r2
            result[part] += products.view(-1, time, others, time).sum((1, 3))


def _add_materialised(
    result: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor] | None, spec: ConvSpec
) -> None:
    out = spec.weight_shape[0] // spec.groups
    both = result.shape[0] + (0 if second is None else result.shape[1])
    per_channel = both * math.prod(spec.weight_shape[1:]) * result.element_size()
    # Whole groups together while they fit, otherwise some of the output channels of one group.
    for group in _ranges(spec.groups, per_channel * out):
        for part in _ranges(out, per_channel * (group.stop - group.start)):
            rows = _partial_grads(*first, spec, group, part)
            columns = rows if second is None else _partial_grads(*second, spec, group, part)
            result.addmm_(rows, columns.mT)


def _partial_grads(x: Tensor, z: Tensor, spec: ConvSpec, group: slice, part: slice) -> Tensor:
    groups, out = group.stop - group.start, part.stop - part.start
    x = x.unflatten(1, (spec.groups, -1))[:, group].flatten(1, 2)
    z = z.unflatten(1, (spec.groups, -1))[:, group, part].flatten(1, 2)
    partial = replace(spec, weight_shape=(groups * out, *spec.weight_shape[1:]), groups=groups)
    return per_sample_grads(x, z, partial).flatten(1)


_FORMS = {"materialise": _add_materialised, "hadamard": _add_hadamard}
