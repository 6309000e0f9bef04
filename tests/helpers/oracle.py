"""The definition that everything is compared with: per-sample gradients by a slow loop, and what is derived
from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from persample.testing.cases import Case, call

Grads = dict[str, Tensor]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; a tied parameter once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loop_grads(model: nn.Module, loss_fn: Callable, inputs: Any, targets: Any) -> Grads:
    """d loss_b / d theta for every sample b and trainable parameter theta: name -> [B, *shape]; zero where
    unused.

    One forward pass of the whole batch, then one backward pass per sample, so it does not matter where the
    batch axis is. For models whose samples do not interact this is the gradient of sample b alone. For
    coupled models it is d loss_b / d theta with the other samples held fixed as context, which is another
    reading (`isolated_grads` differs).
    """
    params = trainable(model)
    losses = loss_fn(call(model, inputs), targets)
    return loop_grads_of(losses, params)


def loop_grads_of(losses: Tensor, params: Mapping[str, Tensor]) -> Grads:
    """The rows d losses[b] / d p of each parameter: name -> [B, *shape]."""
    if losses.dim() != 1:
        raise ValueError(f"one loss per sample, [B], expected; got {list(losses.shape)}")
    rows: list[tuple[Tensor | None, ...]] = []
    for loss in losses.unbind() if losses.requires_grad else ():
        got = torch.autograd.grad(loss, list(params.values()), retain_graph=True, allow_unused=True)
        # the engine may hand out one buffer for several rows; keep a copy of each
        rows.append(tuple(None if g is None else g.detach().clone() for g in got))
    out: Grads = {}
    for i, (name, p) in enumerate(params.items()):
        out[name] = torch.zeros(len(losses), *p.shape, dtype=p.dtype, device=p.device)
        for b, row in enumerate(rows):
            if (g := row[i]) is not None:
                out[name][b] = g.to_dense() if g.is_sparse else g
    return out


def isolated_grads(case: Case, model: nn.Module, loss_fn: Callable, inputs: Any, targets: Any) -> Grads:
    """The gradient of each sample run alone in a batch of one: name -> [B, *shape]. Only for
    ``case.sliceable``.
    """
    params = trainable(model)
    batch = len(loss_fn(call(model, inputs), targets))
    rows = [loop_grads(model, loss_fn, *case.isolate(inputs, targets, b)) for b in range(batch)]
    return {
        name: torch.cat([row[name] for row in rows]) if rows else torch.zeros(0, *p.shape, dtype=p.dtype)
        for name, p in params.items()
    }


def rel_err(got: Tensor | Mapping[str, Tensor], want: Tensor | Mapping[str, Tensor], floor: float = 1e-12) -> float:
    """Largest absolute deviation over the largest absolute value of the reference; for dicts the worst entry.

    Entries of a dict share the scale of the largest one times 1e-3, so that a parameter whose gradient is
    zero up to rounding is not measured by its own noise. Other names, other shapes and NaN are infinitely
    wrong.
    """
    if isinstance(want, Mapping):
        if not isinstance(got, Mapping) or got.keys() != want.keys():
            return float("inf")
        whole = max((float(w.abs().max()) for w in want.values() if w.numel()), default=0.0)
        return max((rel_err(got[k], want[k], max(floor, 1e-3 * whole)) for k in want), default=0.0)
    if not isinstance(got, Tensor) or got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    deviation = float((got - want).abs().max())
    if deviation != deviation:
        return float("inf")
    return deviation / max(float(want.abs().max()), floor)


def layer_of(name: str) -> str:
    """The module path of a parameter; the empty string for parameters of the model itself."""
    return name.rpartition(".")[0]


def regroup(grads: Grads, per: str) -> dict[str, list[str]]:
    """Parameter names gathered per ``"total"`` (one group, ''), ``"layer"`` or ``"param"``."""
    key = {"total": lambda n: "", "layer": layer_of, "param": lambda n: n}[per]
    groups: dict[str, list[str]] = {"": []} if per == "total" else {}
    for name in grads:
        groups.setdefault(key(name), []).append(name)
    return groups


def _rows(grads: Grads, names: list[str]) -> Tensor:
    """The gradients of these parameters flattened side by side, complex ones as pairs of reals: [B, P]."""
    flat = [
        torch.view_as_real(grads[n]).flatten(1) if grads[n].is_complex() else grads[n][..., None].flatten(1)
        for n in names
    ]
    return torch.cat(flat, 1)


def _answer(values: dict[str, Tensor], per: str) -> Any:
    return values[""] if per == "total" else values


def norms(grads: Grads, per: str = "total") -> Any:
    """Euclidean norm of each sample's gradient: [B], or group -> [B]."""
    return _answer({k: _rows(grads, names).norm(dim=1) for k, names in regroup(grads, per).items()}, per)


def gram(grads: Grads, per: str = "total", other: Grads | None = None) -> Any:
    """Inner products of all pairs of samples, of one batch or of two: [B, B'], or group -> [B, B']."""
    other = grads if other is None else other
    return _answer({k: _rows(grads, n) @ _rows(other, n).T for k, n in regroup(grads, per).items()}, per)


def dot(grads: Grads, vectors: Mapping[str, Tensor]) -> Tensor:
    """Inner product of each sample's gradient with the vectors: [B]."""
    line = _rows({k: v[None] for k, v in vectors.items()}, list(grads))[0]
    return _rows(grads, list(grads)) @ line


def dots(grads: Grads, vectors: Mapping[str, Tensor]) -> Tensor:
    """Inner products with directions [k, *shape]: [B, k]."""
    count = len(next(iter(vectors.values())))
    return torch.stack([dot(grads, {n: v[i] for n, v in vectors.items()}) for i in range(count)], 1)


def sum_of_squares(grads: Grads) -> Grads:
    """Sum over samples of |g_b|^2, entry by entry."""
    return {n: g.abs().square().sum(0) for n, g in grads.items()}


def variance(grads: Grads) -> Grads:
    """Mean over samples of |g_b - mean|^2, entry by entry."""
    return {n: (g - g.mean(0)).abs().square().mean(0) for n, g in grads.items()}


def weighted_sum(grads: Grads, c: Tensor | Mapping[str, Tensor]) -> Grads:
    """Sum over samples of c_b g_b, with one c for all, or one per layer (every layer must be there)."""
    per_param = {n: c[layer_of(n)] if isinstance(c, Mapping) else c for n in grads}
    return {n: torch.einsum("b,b...->...", per_param[n].to(g.dtype), g) for n, g in grads.items()}


def clipped_sum(grads: Grads, max_norm: float) -> Grads:
    """Sum over samples of g_b min(1, max_norm / |g_b|); a zero gradient stays zero."""
    total = norms(grads)
    return weighted_sum(grads, torch.where(total > max_norm, max_norm / total, torch.ones_like(total)))


def expected(grads: Grads, other: Grads | None = None, max_norm: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """Every reduction of the dense gradients, by the names of the public API, with the random arguments used.

    Keys ``("norms", per)``, ``("gram", per)``, ``("cross_gram", per)`` if ``other`` is given, and ``"dot"``,
    ``"dots"``, ``"sum_of_squares"``, ``"variance"``, ``"weighted_sum"``, ``"layer_weighted_sum"``,
    ``"clipped_sum"`` with ``"vectors"``, ``"directions"``, ``"c"``, ``"layer_c"``.
    """
    batch = len(next(iter(grads.values())))
    random = torch.Generator().manual_seed(seed)
    vectors = {n: torch.randn(g.shape[1:], generator=random, dtype=g.dtype) for n, g in grads.items()}
    c = torch.randn(batch, generator=random, dtype=torch.float64)
    layer_c = {layer: torch.randn(batch, generator=random, dtype=torch.float64) for layer in regroup(grads, "layer")}
    directions = {n: torch.randn(3, *g.shape[1:], generator=random, dtype=g.dtype) for n, g in grads.items()}
    out: dict[Any, Any] = {"vectors": vectors, "directions": directions, "c": c, "layer_c": layer_c}
    for per in ("total", "layer", "param"):
        out["norms", per] = norms(grads, per)
        out["gram", per] = gram(grads, per)
        if other is not None:
            out["cross_gram", per] = gram(grads, per, other)
    out["dot"] = dot(grads, vectors)
    out["dots"] = dots(grads, directions)
    out["sum_of_squares"], out["variance"] = sum_of_squares(grads), variance(grads)
    out["weighted_sum"] = weighted_sum(grads, c)
    out["layer_weighted_sum"] = weighted_sum(grads, layer_c)
    out["clipped_sum"] = clipped_sum(grads, max_norm)
    return out
