"""What a natural-gradient step did to each layer, as numbers; recorded on request, without waiting for the device.

d, g    the layer's direction, as it went into `.grad`, and the plain gradient
K       Gram matrix of the samples' own gradients
f       the factors B·c_b on each sample's share of the plain gradient; all 1 is SGD
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fngd.natural.solve.directions import relative_damping


def effective_rank(gram: Float[Tensor, "batch batch"]) -> Float[Tensor, ""]:
    """Returns the participation ratio (tr K)²/‖K‖_F² of the eigenvalues of K: 1 … B, 0 for K = 0.

    Parallel gradients give 1, orthogonal ones of equal length B. It needs no eigenvalues: B² multiplications.

    >>> effective_rank(torch.eye(4))
    tensor(4.)
    """
    unit = gram / torch.where(gram.diagonal().amax() > 0, gram.diagonal().amax(), 1)
    squares = unit.square().sum()
    return torch.where(squares > 0, unit.trace().square() / torch.where(squares > 0, squares, 1), 0)


@dataclass(frozen=True)
class Solve:
    """What is known only where a Gram matrix was computed."""

    gram: Tensor
    alpha: float | None
    damping: float | None

    def damped(self) -> Tensor:
        """Returns λ."""
        return relative_damping(self.gram, self.alpha, self.damping).to(self.gram.dtype)


class Recorder:
    """The figures of the latest backward pass, by layer.

    Per layer: "damping" (λ) and "effective_rank" (of K), both of the latest pass that computed K; "mean" and
    "spread" (standard deviation) of the factors, which the true Fisher matrix does not have; "cosine" of d and g;
    "share" ‖d_l‖²/Σ‖d‖² over all layers.
    """

    def __init__(self) -> None:
        self._latest: dict[str, dict[str, Tensor]] = {}

    def add(self, layer: str, factors: Tensor | None, solve: Solve | None, dd: Tensor, dg: Tensor, gg: Tensor) -> None:
        """Records a layer's backward pass; dd, dg and gg are the inner products of d and g."""
        entry = self._latest.setdefault(layer, {})
        if solve is not None:
            entry |= {"damping": solve.damped(), "effective_rank": effective_rank(solve.gram)}
        lengths = (dd * gg).sqrt()
        if factors is not None:
            entry |= {"mean": factors.mean(), "spread": factors.std(correction=0)}
        entry |= {
            "cosine": torch.where(lengths > 0, dg / torch.where(lengths > 0, lengths, 1), 0),
            "length": dd,
        }

    def figures(self) -> dict[str, dict[str, Tensor]]:
        """Returns layer -> name -> tensor of no axes, on the layer's device."""
        result = {}
        lengths = [entry["length"] for entry in self._latest.values()]
        for layer, entry in self._latest.items():
            own = entry["length"]
            total = torch.stack([length.to(own.device) for length in lengths]).sum()
            share = own / torch.where(total > 0, total, 1)
            result[layer] = {name: value for name, value in entry.items() if name != "length"} | {"share": share}
        return result
