"""What NGD and FNGD share: coefficients in the backward pass, then a step of SGD with momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from fngd.coefficients import check_damping, smw_coefficients
from fngd.first_order import sgd_step
from fngd.sharing import CoefficientTable
from persample import LayerGrads, reweight

REDUCTIONS = ("mean", "sum")


def coefficient_factors(
    gram: Float[Tensor, "batch batch"],
    *,
    alpha: float | None,
    damping: float | None,
    scale: str,
    reduction: str,
) -> tuple[Float[Tensor, " batch"], Tensor]:
    """Returns (factors B·c_b on each sample's share of the plain gradient, whether they are finite).

    The plain gradient is Σ_b g_b/B for a mean, Σ_b g_b for a sum; with d = U c (see `fngd.coefficients`) the
    preconditioned one is Σ_b (B·c_b) times the same shares. `gram` is the one of those shares.
    Where a coefficient is NaN or inf all factors are 1 (the plain gradient).
    """
    batch = gram.shape[-1]
    own = gram * batch**2 if reduction == "mean" else gram  # the Gram matrix of the samples' own gradients
    factors = batch * smw_coefficients(own, alpha=alpha, damping=damping, scale=scale)
    good = factors.isfinite().all()
    return torch.where(good, factors, 1.0), good


class NaturalSGD(Optimizer):
    """Base of `NGD` and `FNGD`; `table` holds shared coefficients, None computes them in every step."""

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        defaults: dict[str, Any],
        *,
        table: CoefficientTable | None,
        alpha: float | None,
        damping: float | None,
        scale: str,
        reduction: str,
        batch_axis: int | Mapping[str, int] | None,
    ) -> None:
        check_damping(alpha, damping, scale)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r} is unknown; choose one of {list(REDUCTIONS)}")
        for name in ("lr", "momentum", "weight_decay"):
            if not defaults[name] >= 0:
                raise ValueError(f"{name}={defaults[name]}; it must be at least 0")
        if defaults["nesterov"] and not defaults["momentum"]:
            raise ValueError("nesterov=True needs momentum > 0")
        super().__init__(model.parameters() if params is None else params, defaults)
        self._damping: dict[str, Any] = {
            "alpha": alpha,
            "damping": damping,
            "scale": scale,
            "reduction": reduction,
        }
        self._table = table
        self._met_batch = False
        self._handle = reweight(model, self._factors, batch_axis=batch_axis)

    def _factors(self, layer: str, grads: LayerGrads) -> Tensor:
        self._met_batch = True
        table = self._table
        stored = None if table is None else table.lookup(layer, grads.batch_size, grads.device)
        if stored is not None:
            return stored
        factors, good = coefficient_factors(grads.gram(), **self._damping)
        return factors if table is None else table.store(layer, factors, good)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step with the gradients in `.grad`; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                sgd_step(group, params, [param.grad for param in params], self.state)
        self._end_batch()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients. A batch whose step was skipped (by a GradScaler that met inf) ends here."""
        if self._met_batch:
            self._end_batch()
        super().zero_grad(set_to_none)

    def _end_batch(self) -> None:
        self._met_batch = False
        if self._table is not None:
            self._table.advance()

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's optimiser state and, under "coefficients", the table and the place in the epoch."""
        state = super().state_dict()
        return state if self._table is None else {**state, "coefficients": self._table.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; tensors go to the device of the parameters.

        Raises ValueError if the state holds no coefficients, or those of a loader of another length.
        """
        if self._table is not None:
            if "coefficients" not in state_dict:
                raise ValueError("the state has no 'coefficients': it was not saved by an optimiser that shares them")
            self._table.load_state_dict(state_dict["coefficients"], self.param_groups[0]["params"][0].device)
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._met_batch = False

    def explain(self) -> dict[str, str]:
        """Returns for each linear and convolution layer whether it is preconditioned, and why not."""
        return self._handle.explain()

    def remove(self) -> None:
        """Takes the hooks off the model, which then trains with plain gradients. Harmless when repeated."""
        self._handle.remove()
