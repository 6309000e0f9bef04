"""What reductions are given: buffers, vectors, coefficients, bounds, Hessians; each is right, or told in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persample.blocks.precision import full_precision
from persample.errors import UnsupportedError
from persample.result.grouping import Per

ASYMMETRIC = 1e-3
"""Part of a Hessian by which it may differ from its transpose, and its eigenvalues be negative: rounding; in half
precision a few roundings of it."""


def by_layer(
    c: Float[Tensor, " batch"] | Mapping[str, Float[Tensor, " batch"]], layers: Mapping[str, Any], batch: int
) -> Mapping[str, Tensor]:
    """Coefficients for each layer, [B] each.

    Raises:
        ValueError: layers that are not there or are missing, or another shape.
    """
    found = c if isinstance(c, Mapping) else dict.fromkeys(layers, c)
    if set(found) != set(layers):
        raise ValueError(
            f"c names layers {sorted(set(found) - set(layers))} that are not there and misses "
            f"{sorted(set(layers) - set(found))}; layers are {sorted(layers)}"
        )
    for layer, values in found.items():
        if not isinstance(values, Tensor) or tuple(values.shape) != (batch,):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"c must be a tensor of shape [B] = [{batch}] (layer {layer!r}); got {got}")
    return found


def check_vectors(vectors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> int | None:
    """Returns how many directions there are where vectors are [k, *shape]; None where each is one, of [*shape].

    Raises:
        TypeError: no dict of tensors.
        ValueError: names or shapes that are not those of parameters, or a different number of directions for each.
    """
    if not isinstance(vectors, Mapping):
        raise TypeError(f"vectors must be a dict, parameter name -> tensor; got {type(vectors).__name__}")
    unknown = set(vectors) - set(parameters)
    if unknown:
        raise ValueError(f"vectors has {sorted(unknown)}, which are no trainable parameters of this model")
    found: dict[int | None, str] = {}
    for name, vector in vectors.items():
        if not isinstance(vector, Tensor):
            raise TypeError(f"vectors[{name!r}] must be a tensor; got {type(vector).__name__}")
        shape, many = tuple(parameters[name].shape), vector.ndim == parameters[name].ndim + 1
        if tuple(vector.shape[many:]) != shape:
            raise ValueError(
                f"vectors[{name!r}] must have the parameter's shape {shape}, or [k, *shape] for k directions; "
                f"got {tuple(vector.shape)}"
            )
        found.setdefault(len(vector) if many else None, name)
    if len(found) > 1:
        told = ", ".join(f"{name!r} {'one' if k is None else k}" for k, name in found.items())
        raise ValueError(
            f"vectors must hold the same number of directions for every parameter, [*shape] for one or [k, *shape] "
            f"for k; got {told}. "
            "A single one among several is vector[None].expand(k, *shape), or zeros where it counts for nothing"
        )
    return next(iter(found), None)


def check_buffers(out: Mapping[str, Tensor], parameters: Mapping[str, Tensor], batch: int) -> None:
    """Raises `TypeError` or `ValueError` unless buffers are what rows of parameters can be written into."""
    if not isinstance(out, Mapping):
        raise TypeError(f"out must be a dict, parameter name -> buffer [B, *shape]; got {type(out).__name__}")
    for name, buffer in out.items():
        if not isinstance(buffer, Tensor):
            raise TypeError(f"out[{name!r}] must be a tensor; got {type(buffer).__name__}")
        if name not in parameters:
            raise ValueError(f"out names {name!r}, which is no trainable parameter of this model")
        parameter = parameters[name]
        wanted, dtype = (batch, *parameter.shape), full_precision(parameter.new_empty(0)).dtype
        if buffer.shape != wanted or buffer.dtype != dtype or buffer.device != parameter.device:
            raise ValueError(
                f"out[{name!r}] must be {wanted}, {dtype} on {parameter.device}; got "
                f"{tuple(buffer.shape)}, {buffer.dtype} on {buffer.device}"
            )
        if not buffer.is_contiguous():
            raise ValueError(f"out[{name!r}] must be contiguous; got strides {buffer.stride()}")


def check_alike(parameters: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Raises `ValueError` unless the other batch's gradients are of the same parameters."""
    if {n: p.shape for n, p in others.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ValueError(
            f"other= must hold the same parameters with the same shapes; got {len(others)} parameters "
            f"against {len(parameters)}: differing names "
            f"{sorted(set(others) ^ set(parameters))[:5]}"
        )


def refuse_other(other: Any) -> Any:
    """Returns the `other` of a Gram matrix if it has one itself: a batch in chunks.

    Raises:
        ValueError: it is nothing of the kind.
    """
    if not hasattr(other, "gram") or not hasattr(other, "clipped_sum"):
        raise ValueError(
            f"other must be what per_sample returned for another batch; got {type(other).__name__}. For inner products "
            "with given vectors there is dot(vectors)"
        )
    return other


def clip_factors(
    norms: Callable[[Per], Mapping[str, Tensor]], max_norm: float | int | Mapping[str, float], layers: Iterable[str]
) -> Mapping[str, Tensor]:
    """The factors min(1, C / ‖g_b‖) for each layer, [B] each, from norms over all parameters or by layer.

    Raises:
        ValueError: a bound that is no positive number, or not one for every layer.
    """
    if not isinstance(max_norm, Mapping):
        return dict.fromkeys(layers, _clip(norms("total")[""], max_norm))
    by_layer = norms("layer")
    if set(max_norm) != set(by_layer):
        raise ValueError(f"max_norm must name every layer once; layers are {sorted(by_layer)}, got {sorted(max_norm)}")
    return {layer: _clip(norm, max_norm[layer]) for layer, norm in by_layer.items()}


def _clip(norms: Tensor, max_norm: float | int) -> Tensor:
    """The factors min(1, C / ‖g_b‖); 1 where the norm is zero, NaN where it is no number: no bound holds there."""
    try:
        positive = bool(max_norm > 0)
    except (TypeError, ValueError, RuntimeError):
        positive = False
    if not positive:
        raise ValueError(f"max_norm must be positive; got {max_norm!r}. Give a number, or a dict layer -> number")
    return (max_norm / norms).clamp(max=1).masked_fill(norms.isinf(), torch.nan)


def selected(model: nn.Module, params: Iterable[str | Tensor] | None) -> dict[str, Tensor]:
    """The parameters to differentiate for, by name.

    Raises:
        TypeError, ValueError: what is no parameter of the model, or requires no gradient; nothing.
    """
    there = dict(model.named_parameters())
    if params is None:
        return {name: each for name, each in there.items() if each.requires_grad}
    if isinstance(params, (str, Tensor)) or not isinstance(params, Iterable):
        raise TypeError(
            f"params must be several names of parameters, or tensors; got {type(params).__name__}. For one, [params]"
        )
    names: dict[int, str] = {id(each): name for name, each in there.items()}
    found: dict[str, Tensor] = {}
    for each in params.values() if isinstance(params, Mapping) else params:
        name = each if isinstance(each, str) else names.get(id(each))
        if name is None or name not in there:
            told = repr(each) if isinstance(each, str) else f"a {type(each).__name__}"
            raise ValueError(
                f"params has {told}, which is no parameter of the model ({type(model).__name__}). Give names as in "
                "model.named_parameters(), or its tensors"
            )
        if not there[name].requires_grad:
            raise ValueError(f"params has {name!r}, which requires no gradient: call requires_grad_() on it")
        found[name] = there[name]
    if not found:
        raise ValueError("params holds no parameter; leave it out for all that require a gradient")
    return found


def check_size(chunk_size: int | None) -> None:
    """Raises `ValueError` for what is no number of samples."""
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a positive number of samples, or None; got {chunk_size!r}")


def check_outputs(outputs: Any, of_model: bool) -> Tensor:
    """Returns the outputs if they are real numbers, [B, *out], C of them for each sample.

    Raises:
        TypeError: no tensor.
        ValueError: another shape, or integers.
        UnsupportedError: complex numbers.
    """
    who = "the model" if of_model else "output_fn"
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"{who} must return one tensor, [B, *out], to differentiate; got {type(outputs).__name__}. Choose with "
            "output_fn=, for example output_fn=lambda out: out[0]"
        )
    if outputs.is_complex():
        raise UnsupportedError(
            "the outputs are complex. Differentiate real and imaginary parts as two outputs: "
            "output_fn=lambda out: torch.view_as_real(out)"
        )
    if not outputs.is_floating_point():
        raise ValueError(f"the outputs must be real numbers; got {outputs.dtype}")
    if outputs.ndim == 0 or not prod(outputs.shape[1:]):
        raise ValueError(f"{who} must return [B, *out], an output or more for each sample; got {tuple(outputs.shape)}")
    return outputs


def root_of(hessian: Any, shape: tuple[int, ...]) -> Float[Tensor, "batch out out"]:
    """The symmetric root of each sample's Hessian, [B, C, C].

    Raises:
        ValueError: what is no Hessian of outputs of this shape, or has none.
    """
    wanted = (*shape, *shape[1:])
    if not isinstance(hessian, Tensor) or tuple(hessian.shape) != wanted:
        got = tuple(hessian.shape) if isinstance(hessian, Tensor) else type(hessian).__name__
        raise ValueError(f"hessian must be a tensor [B, *out, *out] = {wanted}; got {got}")
    if not hessian.is_floating_point() or not bool(hessian.isfinite().all()):
        raise ValueError("hessian must hold real, finite numbers; a loss that is not finite has no Gauss–Newton matrix")
    count = prod(shape[1:])
    matrix = full_precision(hessian.detach()).reshape(shape[0], count, count)
    allowed = max(ASYMMETRIC, 4 * torch.finfo(hessian.dtype).eps) * (matrix.abs().amax() if matrix.numel() else 0)
    if bool(((matrix - matrix.mT).abs() > allowed).any()):
        raise ValueError("hessian must be symmetric, H[b] = H[b].T over the outputs of a sample")
    values, vectors = torch.linalg.eigh(matrix)
    if bool((values < -allowed).any()):
        raise ValueError(
            f"hessian must have no negative eigenvalue; got {float(values.min()):.3g}. Losses that are convex in the "
            "outputs have none; of others take the part that is: clamp the eigenvalues, or add a part of the identity"
        )
    return (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
