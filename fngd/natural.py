"""What NGD and FNGD share: coefficients in the backward pass, then a step of SGD with momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from fngd.coefficients import SCALES, check_damping, smw_coefficients
from fngd.diagnostics import Recorder, Solve
from fngd.distributed import Exchange, mean_over_processes
from fngd.first_order import sgd_step
from fngd.sharing import CoefficientTable
from persample import LayerGrads, reweight

REDUCTIONS = ("mean", "sum")
FISHERS = ("empirical", "improved")
GRAMS = ("layer", "network", "global")
NETWORK = "(network)"
"""The key of coefficients that hold for all layers."""


@dataclass(frozen=True)
class Method:
    """What becomes of the per-sample gradients; `NGD` explains the options."""

    alpha: float | None
    damping: float | None
    scale: str = "absorb"
    reduction: str = "mean"
    fisher: str = "empirical"
    gram: str = "layer"
    kl_clip: float | None = None
    output_axis: int = 0

    def __post_init__(self) -> None:
        known = {
            "scale": (*SCALES, "graft"), "reduction": REDUCTIONS, "fisher": FISHERS, "gram": GRAMS
        }  # fmt: skip
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {list(allowed)}")
        check_damping(self.alpha, self.damping, self.solved_scale)
        if self.kl_clip is not None and not self.kl_clip > 0:
            raise ValueError(f"kl_clip={self.kl_clip}; it must be > 0 (1e-3 is usual), or None for no clipping")
        if self.gram == "global" and (self.kl_clip is not None or self.scale == "graft"):
            raise ValueError(
                "gram='global' has neither kl_clip nor scale='graft': a process sees its own part of the direction "
                "only. Use gram='layer', where every process has a direction of its own"
            )

    @property
    def solved_scale(self) -> str:
        """The scale of the coefficients; grafting takes any and rescales the direction."""
        return "absorb" if self.scale == "graft" else self.scale


def coefficient_factors(
    gram: Float[Tensor, "batch batch"],
    *,
    alpha: float | None,
    damping: float | None,
    scale: str,
    reduction: str,
    rhs: Float[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, " batch"], Tensor]:
    """Returns (factors B·c_b on each sample's share of the plain gradient, whether they are finite).

    The plain gradient is Σ_b g_b/B for a mean, Σ_b g_b for a sum; with d = U c (see `fngd.coefficients`) the
    preconditioned one is Σ_b (B·c_b) times the same shares. `gram` is the one of those shares.
    Where a coefficient is NaN or inf all factors are 1 (the plain gradient).
    """
    batch = gram.shape[-1]
    own = gram * batch**2 if reduction == "mean" else gram  # the Gram matrix of the samples' own gradients
    factors = batch * smw_coefficients(own, alpha=alpha, damping=damping, scale=scale, rhs=rhs)
    good = factors.isfinite().all()
    return torch.where(good, factors, 1.0), good


def kl_clip_scale(inner: Iterable[Iterable[tuple[Any, Tensor]]], kappa: float, group: Any = None) -> Tensor:
    """Returns ν = min(1, √(κ/Σ_l lr_l²⟨d_l, g_l⟩)); inner holds (lr_l, ⟨d_l, g_l⟩) for each backward pass.

    Of several passes and processes, whose directions are added, only their own inner products are known. As
    ⟨Σd, Σg⟩ ≤ (Σ_i √⟨d_i, g_i⟩)² where they share a metric, that bound is taken: ν is never too large.
    """
    totals = [torch.stack([value * lr**2 for lr, value in layers]).sum() for layers in inner]
    root = torch.stack(totals).clamp_min(0).sqrt().sum()
    return (kappa**0.5 / mean_over_processes(root, group)).clamp(max=1.0)  # 0 ≤ root: x/0 = inf is clamped


class NaturalSGD(Optimizer):
    """Base of `NGD` and `FNGD`; `table` holds shared coefficients, None computes them in every step."""

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        defaults: dict[str, Any],
        *,
        table: CoefficientTable | None,
        method: Method,
        scaler: Any,
        process_group: Any,
        diagnostics: bool,
        batch_axis: int | Mapping[str, int] | None,
    ) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            if not defaults[name] >= 0:
                raise ValueError(f"{name}={defaults[name]}; it must be at least 0")
        if defaults["nesterov"] and not defaults["momentum"]:
            raise ValueError("nesterov=True needs momentum > 0")
        super().__init__(model.parameters() if params is None else params, defaults)
        self._model, self._method, self._table, self._scaler = model, method, table, scaler
        self._group, self._exchange = process_group, Exchange(process_group)
        self._recorder = Recorder() if diagnostics else None
        self._met_batch = False
        self._inner: dict[str, list[Tensor]] = {}  # ⟨d, g⟩ of each backward pass since the last step
        joint = method.gram == "network"
        self._handle = reweight(
            model,
            self._answers if joint else self._answer,
            batch_axis=batch_axis,
            joint=joint,
            outputs=method.fisher == "improved",
        )
        self._find_groups()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as any optimiser does."""
        super().add_param_group(param_group)
        if hasattr(self, "_handle"):  # torch's constructor calls this, too
            self._find_groups()

    def _find_groups(self) -> None:
        """Notes each layer's group by its number: loading a state makes new groups, and FSDP swaps parameters."""
        numbers = {id(p): number for number, group in enumerate(self.param_groups) for p in group["params"]}
        weights = {path: self._model.get_submodule(path)._parameters.get("weight") for path in self._handle.explain()}
        self._group_of = {path: numbers.get(id(weight)) for path, weight in weights.items()}

    def _option(self, layer: str, name: str, default: Any) -> Any:
        number = self._group_of[layer]
        return default if number is None else self.param_groups[number].get(name, default)

    def _answer(self, layer: str, grads: LayerGrads) -> Any:
        return self._answers({layer: grads}).get(layer)

    def _answers(self, grads: dict[str, LayerGrads]) -> dict[str, Any]:
        self._met_batch = True
        grads = {path: each for path, each in grads.items() if self._option(path, "precondition", True)}
        if not grads:
            return {}
        factors, solve = self._factors(grads)
        if self._method.scale != "graft" and self._method.kl_clip is None and self._recorder is None:
            return dict.fromkeys(grads, factors)
        return self._compared(grads, factors, solve)

    def _factors(self, grads: dict[str, LayerGrads]) -> tuple[Tensor, Solve | None]:
        key, first = next(iter(grads.items()))
        if self._method.gram == "network":
            key = NETWORK
            sizes = {path: each.batch_size for path, each in grads.items()}
            if len(set(sizes.values())) > 1:
                raise ValueError(f"gram='network' needs the same samples in every layer, but batches are {sizes}")
        table = self._table
        stored = None if table is None else table.lookup(key, first.batch_size, first.device)
        if stored is not None:
            assert table is not None, "it has just answered"
            if table.probing(key):
                table.probe(stored, self._solve(grads)[0])
            return stored, None
        factors, good, solve = self._solve(grads)
        return factors if table is None else table.store(key, factors, good), solve

    def _solve(self, grads: dict[str, LayerGrads]) -> tuple[Tensor, Tensor, Solve]:
        method, first = self._method, next(iter(grads.values()))
        batch, mean = first.batch_size, method.reduction == "mean"
        sizes, mine, share = [batch], slice(None), 1.0
        rhs = self._output_norms(batch) if method.fisher == "improved" else None
        if method.gram == "global":
            sizes, mine = self._exchange.sizes(batch, first.device)
            rhs = None if rhs is None else self._exchange.gather(rhs)
            grads = self._handle.joined(self._exchange.gather)
            share = len(sizes) * batch / sum(sizes) if mean else 1.0  # DDP and FSDP average means of batches
        one, *others = (each.gram() for each in grads.values())
        gram = sum(others, one)
        if mean:  # the samples' own gradients are B times their shares, B the size of the batch they were in
            own = torch.cat([gram.new_full((size,), size) for size in sizes])
            gram, rhs = gram * (own[:, None] * own), None if rhs is None else rhs * own**2
        scale = self._loss_scale()
        if scale is not None:
            gram = gram / scale**2
            rhs = None if rhs is None else rhs / scale**2
        damping = {"alpha": method.alpha, "damping": method.damping}
        factors, good = coefficient_factors(gram, scale=method.solved_scale, reduction="sum", rhs=rhs, **damping)
        return factors[mine] * share, good, Solve(gram, **damping)

    def _output_norms(self, batch: int) -> Tensor:
        """‖∂ℓ/∂output‖² by sample, of the shares of the training loss."""
        grad = self._handle.output_grad
        axis = self._method.output_axis
        if grad is None or grad.dim() <= axis or grad.shape[axis] != batch:
            found = "none was seen" if grad is None else f"it has shape {list(grad.shape)}"
            raise ValueError(
                f"fisher='improved' needs the gradient at the model's output, with {batch} samples on axis {axis}, "
                f"but {found}. Call the model itself, compute the loss from what it returns, and give output_axis= "
                "if samples are on another axis."
            )
        grad = grad.movedim(axis, 0).flatten(1)
        return grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum(1)

    def _loss_scale(self) -> Tensor | None:
        # The public get_scale() waits for the device.
        return None if self._scaler is None else self._scaler._get_scale_async()

    def _compared(self, grads: dict[str, LayerGrads], factors: Tensor, solve: Solve | None) -> dict[str, Any]:
        """Directions formed beside the plain gradients: for grafting, the KL clip and diagnostics."""
        ones, graft = torch.ones_like(factors), self._method.scale == "graft"
        pairs = {path: (each.weighted_sum(factors), each.weighted_sum(ones)) for path, each in grads.items()}
        products = {path: (_dot(d, d), _dot(d, g), _dot(g, g)) for path, (d, g) in pairs.items()}
        ratio = torch.ones_like(factors[0])
        if graft:  # the layer, or with gram="network" all of them together
            dd, gg = (torch.stack([each[i] for each in products.values()]).sum() for i in (0, 2))
            ratio = torch.where(dd > 0, (gg / torch.where(dd > 0, dd, 1)).sqrt(), 1)
        scale = self._loss_scale()
        for path, (dd, dg, gg) in products.items():
            true = ratio * dg if scale is None else ratio * dg / scale**2
            if self._method.kl_clip is not None:
                self._inner.setdefault(path, []).append(true)
            if self._recorder is not None:
                self._recorder.add(path, factors * ratio, solve, ratio**2 * dd, ratio * dg, gg)
        if not graft:
            return {path: d for path, (d, _) in pairs.items()}
        return {path: tuple(None if part is None else part * ratio for part in d) for path, (d, _) in pairs.items()}

    @property
    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """For each layer what the latest backward pass did to it, see `fngd.diagnostics`; needs diagnostics=True.

        >>> model = nn.Linear(3, 1)
        >>> opt = fngd.NGD(model, lr=0.1, diagnostics=True)
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> opt.step()
        >>> sorted(opt.diagnostics[""])
        ['cosine', 'damping', 'effective_rank', 'mean', 'share', 'spread']
        """
        if self._recorder is None:
            raise ValueError("nothing was recorded; construct the optimiser with diagnostics=True")
        return self._recorder.figures()

    @property
    def bytes_sent(self) -> int:
        """Bytes that this process has sent to gather factors, with gram='global'; DDP's own are not counted.

        >>> fngd.NGD(nn.Linear(3, 1), lr=0.1, gram="global").bytes_sent  # one process has nobody to send to
        0
        """
        return self._exchange.bytes_sent

    def _clipped(self) -> dict[Tensor, Tensor]:
        """The gradients of preconditioned layers times ν, by parameter; empty without a KL clip."""
        if self._method.kl_clip is None or not self._inner:
            return {}
        passes: list[list[tuple[Any, Tensor]]] = []
        params = []
        for layer, values in self._inner.items():
            rate = self._option(layer, "lr", 0.0)
            for number, value in enumerate(values):
                passes += [[] for _ in range(number + 1 - len(passes))]
                passes[number].append((rate, value))
            params += list(self._model.get_submodule(layer)._parameters.values())
        scale = kl_clip_scale(passes, self._method.kl_clip, self._group)
        return {p: _times(p.grad, scale) for p in params if p is not None and p.grad is not None}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step with the gradients in `.grad`; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clipped = self._clipped()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                sgd_step(group, params, [clipped.get(param, param.grad) for param in params], self.state)
        self._end_batch()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients. A batch whose step was skipped (by a GradScaler that met inf) ends here."""
        if self._met_batch:
            self._end_batch()
        super().zero_grad(set_to_none)

    def _end_batch(self) -> None:
        self._met_batch = False
        self._inner.clear()
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
        self._inner.clear()

    def explain(self) -> dict[str, str]:
        """Returns for each linear and convolution layer whether it is preconditioned, and why not.

        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        >>> opt = fngd.NGD(model, lr=0.1)
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> opt.explain()
        {'0': 'reweighted, samples on axis 0 of its output'}
        """
        return self._handle.explain()

    def remove(self) -> None:
        """Takes the hooks off the model, which then trains with plain gradients. Harmless when repeated.

        >>> model = nn.Linear(3, 1)
        >>> fngd.NGD(model, lr=0.1).remove()
        >>> opt = fngd.NGD(model, lr=0.2)  # a second one, as the first is gone
        """
        self._handle.remove()


def _dot(first: tuple[Tensor | None, ...], second: tuple[Tensor | None, ...]) -> Tensor:
    """⟨first, second⟩ of the gradients of weight and bias together."""
    parts = [(a * b).sum() for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return torch.stack(parts).sum()


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    """grad·factor; a sharded tensor (FSDP) multiplies only with its like, so there each process scales its part."""
    if not hasattr(grad, "to_local"):
        return grad * factor
    local, placing = grad.to_local() * factor, (grad.device_mesh, grad.placements)  # type: ignore[attr-defined]
    return type(grad).from_local(local, *placing, shape=grad.shape, stride=grad.stride())  # type: ignore[attr-defined]
