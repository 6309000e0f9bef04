"""What natural gradient sees in a model: correlation matrices of layers (FNGD paper, Fig. 3) and diagnostics.

K       Gram matrix UᵀU of the samples' gradients at one layer, weight and bias together (the paper's correlation
        matrix)
C       the same with gradients of length 1: C_ab = K_ab / √(K_aa·K_bb), the cosine of two samples' gradients
likeness of two layers: the correlation (Pearson) of the entries of their C above the diagonal; 1 where the same pairs
        of samples are alike in both, 0 where one tells nothing about the other
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fngd.natural.ngd import NGD
from persample import LayerGrads, reweight

PANELS = (("effective_rank", "effective rank of K"), ("spread", "spread of B·c"), ("cosine", "cosine of d and g"))
"""Diagnostics that are drawn by layer."""


@dataclass(frozen=True)
class Inspection:
    """One batch, seen at every preconditioned layer, in the order of the forward pass."""

    grams: dict[str, Float[Tensor, "batch batch"]]
    diagnostics: dict[str, dict[str, float]]
    labels: Int[Tensor, " batch"]


def inspect(
    model: nn.Module,
    inputs: Tensor,
    labels: Int[Tensor, " batch"],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    alpha: float = 1e-2,
) -> Inspection:
    """Returns Gram matrices and NGD's diagnostics for one batch; the model stays as it is.

    Arguments:
        loss: loss(outputs, labels), the mean over the batch.
        alpha: damping relative to ‖K‖_F, > 0.

    Raises ValueError where the model has no linear or convolution layer that takes part.

    >>> found = inspect(nn.Linear(3, 2), torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 0]))
    >>> found.grams[""].shape
    torch.Size([5, 5])
    """
    model = copy.deepcopy(model)
    grams: dict[str, Tensor] = {}

    def keep(layer: str, grads: LayerGrads) -> None:
        grams[layer] = grads.gram() * grads.batch_size**2  # of the samples' own gradients

    model.train()
    with reweight(model, keep, functions=True):
        loss(model(inputs), labels).backward()
    if not grams:
        raise ValueError("the model has no linear or convolution layer whose weight is trained: nothing to look at")
    optimizer = NGD(model, alpha=alpha, diagnostics=True)
    loss(model(inputs), labels).backward()
    found = {
        layer: {name: value.item() for name, value in each.items()} for layer, each in optimizer.diagnostics.items()
    }
    optimizer.remove()
    layers = list(reversed(grams))  # a backward pass meets the last layer first
    return Inspection({layer: grams[layer] for layer in layers}, {layer: found[layer] for layer in layers}, labels)


def cosines(gram: Float[Tensor, "batch batch"]) -> Float[Tensor, "batch batch"]:
    """Returns C; 0 where a sample's gradient vanishes.

    >>> cosines(torch.tensor([[4.0, 3.0], [3.0, 9.0]]))
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """
    lengths = gram.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(lengths > 0, 1 / torch.where(lengths > 0, lengths, 1), 0)
    return gram * inverse * inverse[:, None]


def likeness(first: Float[Tensor, "batch batch"], second: Float[Tensor, "batch batch"]) -> float:
    """Returns the likeness of two layers from their Gram matrices: −1 … 1; NaN for fewer than 3 samples.

    >>> gram = torch.tensor([[1.0, 0.2, 0.4], [0.2, 1.0, 0.9], [0.4, 0.9, 1.0]])
    >>> round(likeness(gram, 4 * gram), 3)
    1.0
    """
    rows, columns = torch.triu_indices(len(first), len(first), offset=1)
    entries = torch.stack([cosines(gram)[rows, columns] for gram in (first, second)])
    return torch.corrcoef(entries)[0, 1].item() if entries.shape[1] > 1 else float("nan")


def ends(layers: Sequence[str]) -> list[str]:
    """Returns the first two and the last two, as in the paper's figure; fewer where there are fewer.

    >>> ends(["a", "b", "c", "d", "e"])
    ['a', 'b', 'd', 'e']
    """
    return list(layers) if len(layers) < 5 else [*layers[:2], *layers[-2:]]


def check_layers(chosen: Sequence[str], met: Sequence[str]) -> None:
    """Raises ValueError where one of the chosen layers was not met."""
    unknown = [layer for layer in chosen if layer not in met]
    if unknown:
        raise ValueError(f"layers {unknown} are none of those that were met: {list(met)}")


def draw(found: Inspection, path: Path, *, title: str, layers: Sequence[str] | None = None) -> None:
    """Draws C of some layers (default `ends`) with samples sorted by label, the likeness of all layers, diagnostics.

    Raises ValueError where `layers` names one that was not met.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(found.grams)
    chosen = list(layers) if layers is not None else ends(names)
    check_layers(chosen, names)
    matrices = {layer: sorted_cosines(found, layer) for layer in chosen}
    likenesses = [[likeness(a, b) for b in found.grams.values()] for a in found.grams.values()]
    figure = Figure(figsize=(3.1 * max(4, len(chosen)), 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 1)
    top, bottom = (figure.add_subfigure(grid[row]) for row in range(2))
    draw_matrices(top, matrices)
    axes = bottom.subplots(1, 1 + len(PANELS))
    draw_likeness(axes[0], likenesses)
    for axis, (name, words) in zip(axes[1:], PANELS, strict=True):
        axis.plot(range(1, len(names) + 1), [found.diagnostics[layer][name] for layer in names], "o-", ms=3, lw=1)
        axis.set(xlabel="layer", title=words)
        axis.title.set_fontsize(9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def sorted_cosines(found: Inspection, layer: str) -> Float[Tensor, "batch batch"]:
    """Returns C of a layer with samples of one label next to each other."""
    order = found.labels.argsort(stable=True)
    return cosines(found.grams[layer])[order][:, order].cpu()


def draw_matrices(figure: Any, matrices: dict[str, Tensor]) -> None:
    """Draws correlation matrices side by side, in one scale of colours."""
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axis, (layer, matrix) in zip(axes, matrices.items(), strict=True):
        image = axis.imshow(matrix.numpy(), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axis.set_title(layer or "(the model)", fontsize=9)
        axis.set_xlabel("sample, sorted by label", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.colorbar(image, ax=list(axes), shrink=0.8, label="cosine of gradients")


def draw_likeness(axis: Any, likenesses: Sequence[Sequence[float]]) -> None:
    """Draws the likeness of every pair of layers."""
    last = len(likenesses) + 0.5
    image = axis.imshow(likenesses, vmin=-1, vmax=1, cmap="RdBu_r", extent=(0.5, last, last, 0.5))
    axis.set(xlabel="layer", ylabel="layer")
    for one in (axis.xaxis, axis.yaxis):
        one.get_major_locator().set_params(integer=True)
    axis.set_title("likeness of layers", fontsize=9)
    axis.figure.colorbar(image, ax=axis, shrink=0.7)
