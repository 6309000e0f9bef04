"""Natural gradient descent with fresh coefficients in every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fngd.natural import NaturalSGD


class NGD(NaturalSGD):
    """Layer-wise natural gradient descent by Sherman–Morrison–Woodbury; a `torch.optim.Optimizer`.

        d_l = (λI + UUᵀ/B)⁻¹ g_l = U c,    c = (K + λB·I)⁻¹ 1,    λ = α‖K‖_F    (FNGD paper, eqs. 5, 9, 14)

    for every linear and convolution layer l, weight and bias together; the other parameters get the plain
    gradient. Both then go through SGD with momentum and weight decay. See `fngd.coefficients` for the
    symbols.

    Arguments:
        model: the model; its `loss.backward()` accumulates d instead of g until `remove()`.
        params: parameters or parameter groups, as for any optimiser; default: all of the model's.
        lr, momentum, nesterov, weight_decay: as in `torch.optim.SGD`, ≥ 0.
        decoupled_weight_decay: shrink the parameters by lr·weight_decay instead of adding to the gradient.
        alpha, damping: relative (default 1e-2) or absolute damping, > 0; `alpha=None` with `damping=`.
        scale: "absorb" (λ·d; the plain gradient for heavy damping) or "per_layer" (d).
        reduction: how the training loss is reduced over the batch, "mean" or "sum"; with "absorb" and alpha
            it makes no difference.
        batch_axis: see `persample.reweight`.

    Raises:
        ValueError: an argument out of range, or a model that is reweighted already.

    Approximate: the empirical Fisher matrix, block-diagonal by layer. Through BatchNorm in training mode g_b
    is what flows through sample b's rows. A batch of one sample is scaled by α/(1 + α) under "absorb".

    >>> model = nn.Linear(3, 1)
    >>> opt = NGD(model, lr=0.1)
    >>> model(torch.randn(8, 3)).square().mean().backward()
    >>> opt.step()
    >>> opt.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        alpha: float | None = 1e-2,
        damping: float | None = None,
        scale: str = "absorb",
        reduction: str = "mean",
        batch_axis: int | Mapping[str, int] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(
            model,
            params,
            defaults,
            table=None,
            alpha=alpha,
            damping=damping,
            scale=scale,
            reduction=reduction,
            batch_axis=batch_axis,
        )
