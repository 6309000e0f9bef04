"""EK-FAC influence: what a training sample does to a query's loss, without training again.

    symbol   meaning                                                                        shape
    g_m, g_q gradients of the losses of training sample m and query q, of one layer         [out, inp]
    Q_A, Q_G eigenvectors of KFAC's factors over all training samples                       (see `fngd.kronecker.ekfac`)
    S        mean over training samples of (Q_Gᵀ g Q_A)², entry by entry                    [out, inp]
    λ        damping: α·(mean of S) of the layer, or a number for all
    I_qm     Σ_layers ⟨g_q, (Q diag(S) Qᵀ + λI)⁻¹ g_m⟩                                      [queries, samples]

I_qm > 0: giving sample m more weight in training lowers the loss of query q, to first order and up to a positive factor
(Koh and Liang 2017; with EK-FAC in place of the Hessian matrix: Grosse et al. 2023). With fisher="true" g in S and in
the factors is of labels that the model draws, so that the matrix is a Gauss–Newton matrix; "empirical" takes the
training labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fngd.kronecker.ekfac import CHUNK, rotated_moments
from fngd.kronecker.kfac import KroneckerFactors, kfac_factors, symmetric_eigen
from fngd.kronecker.layers.chosen import Chosen
from fngd.kronecker.statistics import Kept, Statistics
from fngd.natural.true_fisher.likelihoods import sampled_losses
from persample import LayerGrads, reweight

FISHERS = ("true", "empirical")
Batches = Iterable[tuple[Any, Any]]


@dataclass
class _Layer:
    """What has been gathered of a layer so far; eigenvectors and S when they are known."""

    statistics: Statistics | None = None
    samples: int = 0
    q_a: Tensor = field(default_factory=lambda: torch.empty(0))
    q_g: Tensor = field(default_factory=lambda: torch.empty(0))
    scales: Any = 0.0


def influence(
    train: Batches,
    query: Batches,
    *,
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    alpha: float = 0.1,
    damping: float | None = None,
    fisher: str = "true",
    likelihood: str | Callable[[Tensor], Tensor] = "categorical",
    seed: int = 0,
) -> Float[Tensor, "queries samples"]:
    """Returns the influence of every training sample on every query, [queries, samples] (Grosse et al. 2023).

        I_qm = Σ_layers ⟨g_q, (Q diag(S) Qᵀ + λI)⁻¹ g_m⟩    (symbols: `fngd.data_influence`)

    over linear and (not transposed) convolution layers, weight and bias together; other parameters are left out. The
    model is as it was afterwards; call `model.eval()` first where it has dropout or batch normalisation.

    Arguments:
        train: batches (inputs, targets), read three times, in the same order: a list, or a loader without shuffling.
        query: the same, read once. x and z of a batch, and one preconditioned gradient a query, are held.
        model: called with inputs.
        loss: loss(outputs, targets), [batch], each sample's own.
        alpha: λ over the mean of S of the layer, > 0.
        damping: λ > 0 itself, for all layers, in the place of alpha.
        fisher: "true" or "empirical".
        likelihood: with "true": "categorical", "bernoulli", "gaussian", or a function, as `NGD.sample` takes it.
        seed: of the labels that are drawn.

    Raises:
        ValueError: an argument out of range, no layer that is covered, an iterator in place of batches, or losses that
            are not [batch].

    Approximate: layers apart, EK-FAC in each, one Newton step from the parameters as they are.

    >>> model = nn.Linear(3, 2)
    >>> batches = [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0])) for _ in range(2)]
    >>> loss = lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, reduction="none")
    >>> influence(batches, batches[:1], model=model, loss=loss).shape
    torch.Size([4, 8])
    """
    _check(train, alpha, damping, fisher)
    chosen = Chosen(model, functions=False)
    params = [p for p in model.parameters() if p.requires_grad]
    seen: dict[str, Kept] = {}

    def look(path: str, grads: LayerGrads) -> None:
        if path in chosen.modules and chosen.has_factors(path, grads):
            bias = chosen.modules[path]._parameters.get("bias")
            seen[path] = Kept([(x.detach(), z.detach()) for x, z in grads.factors()], _trained(bias))

    def passes(batches: Batches, *, drawn: bool) -> Iterator[dict[str, Kept]]:
        """x and z of the layers, batch by batch."""
        generator = None
        for inputs, targets in batches:
            with torch.enable_grad():
                outputs = model(inputs)
                if drawn:
                    if generator is None:
                        generator = torch.Generator(outputs.device).manual_seed(seed)
                    losses = sampled_losses(outputs, likelihood, axis=0, class_axis=None, generator=generator)
                else:
                    losses = loss(outputs, targets)
                _check_losses(losses)
                seen.clear()
                torch.autograd.grad(losses.sum(), params, allow_unused=True)
            yield dict(seen)

    layers: dict[str, _Layer] = {}
    true = fisher == "true"
    with reweight(model, look) as handle, torch.no_grad():
        chosen.handle = handle
        for kept in passes(train, drawn=true):
            _add_factors(layers, kept)
        if not layers:
            raise ValueError("the model has no linear or convolution layer with trained weights: nothing is covered")
        for layer in layers.values():
            _decompose(layer)
        for kept in passes(train, drawn=true):
            for path, each in kept.items():
                layers[path].scales = layers[path].scales + rotated_moments(each, layers[path].q_a, layers[path].q_g)
        for layer in layers.values():
            mean = layer.scales / layer.samples
            layer.scales = mean + (mean.mean() * alpha if damping is None else damping)
        queries = [_rotated(layers, kept, divide=True) for kept in passes(query, drawn=False)]
        together = {path: torch.cat([each[path] for each in queries if path in each]) for path in layers}
        blocks = [_products(layers, kept, together) for kept in passes(train, drawn=False)]
    return torch.cat(blocks, 1)


def _add_factors(layers: dict[str, _Layer], kept: dict[str, Kept]) -> None:
    method, random = KroneckerFactors(0.0, "eigen", None), torch.Generator()
    for path, each in kept.items():
        convolution = each.factors[0][0].dim() > 4
        new = method.collect(each.factors, bias=each.bias, convolution=convolution, random=random)
        layer = layers.setdefault(path, _Layer())
        layer.statistics = new if layer.statistics is None else method.combine(layer.statistics, new)
        layer.samples += new.samples


def _decompose(layer: _Layer) -> None:
    assert layer.statistics is not None, "made with the first batch"
    a, g = kfac_factors(layer.statistics, "sum")
    (_, layer.q_a), (_, layer.q_g) = symmetric_eigen(a), symmetric_eigen(g)
    layer.statistics = None


def _gradients(layer: _Layer, kept: Kept) -> Iterator[Float[Tensor, "n groups out inp"]]:
    """The samples' gradients in the eigenbasis, some at a time."""
    for x, z in kept.chunks(CHUNK):
        yield ((z @ layer.q_g.unsqueeze(1)).mT @ (x @ layer.q_a.unsqueeze(1))).transpose(0, 1)


def _rotated(layers: dict[str, _Layer], kept: dict[str, Kept], *, divide: bool) -> dict[str, Tensor]:
    found = {}
    for path, each in kept.items():
        if path in layers:
            parts = torch.cat(list(_gradients(layers[path], each)))
            found[path] = parts / layers[path].scales if divide else parts
    return found


def _products(layers: dict[str, _Layer], kept: dict[str, Kept], queries: dict[str, Tensor]) -> Tensor:
    """[queries, samples of this batch]."""
    total: Any = 0.0
    for path, each in kept.items():
        if path in layers:
            columns = [queries[path].flatten(1) @ part.flatten(1).mT for part in _gradients(layers[path], each)]
            total = total + torch.cat(columns, 1)
    return total


def _trained(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def _check(train: Batches, alpha: float, damping: float | None, fisher: str) -> None:
    if fisher not in FISHERS:
        raise ValueError(f"fisher={fisher!r} is unknown; choose one of {list(FISHERS)}")
    for name, value in (("alpha", alpha), ("damping", damping)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value!r}; it must be a number > 0")
    if iter(train) is train:
        raise ValueError(
            f"train is an iterator ({type(train).__name__}), which can be read once; give a list of batches or a loader"
        )


def _check_losses(losses: Any) -> None:
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        found = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f'loss must return one number for each sample, [batch] (reduction="none"), but gave {found}')
