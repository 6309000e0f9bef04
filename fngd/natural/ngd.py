"""Natural gradient descent with fresh coefficients in every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from typing_extensions import Unpack

from fngd.natural.base import NaturalSGD
from fngd.natural.options import Options
from fngd.natural.solve.history import History, check_history
from fngd.optim.checks import showing
from fngd.optim.groups import first_parameter


class NGD(NaturalSGD):
    """Layer-wise natural gradient descent by Sherman–Morrison–Woodbury; a `torch.optim.Optimizer`.

        d_l = (λI + UUᵀ/B)⁻¹ g_l = U c,    c = (K + λB·I)⁻¹ 1,    λ = α‖K‖_F    (FNGD paper, eqs. 5, 9, 14)

    for every linear and convolution layer l, weight and bias together; the other parameters get the plain
    gradient. Both then go through SGD with momentum and weight decay. A weight that a module and a function use, or
    two modules with biases of their own, has a block for each of them; with the same bias, or none, they are one layer.
    See `fngd.coefficients` for the symbols.

    Arguments:
        model: the model; its `loss.backward()` accumulates d instead of g until `remove()`.
        params: parameters or parameter groups, as for any optimiser; default: all of the model's.
        lr, momentum, nesterov, weight_decay: as in `torch.optim.SGD`, ≥ 0.
        decoupled_weight_decay: shrink the parameters by lr·weight_decay instead of adding to the gradient.
        alpha, damping: relative (default 1e-2) or absolute damping, > 0; `alpha=None` with `damping=`.
        scale: "absorb" (λ·d; the plain gradient for heavy damping), "per_layer" (d), or "graft" (d rescaled to the
            length of the layer's plain gradient, at the cost of one more weight gradient a layer).
        reduction: how the training loss is reduced over the batch, "mean" or "sum"; with "absorb" and alpha
            it makes no difference.
        fisher: "empirical"; "improved" (iEF): c = (K + λB·I)⁻¹ s with s_b = ‖∂ℓ_b/∂output‖², so that samples
            that are fitted already do not dominate. The output is what the model's own forward returns (its first
            tensor with an axis): return logits, not probabilities. s has the scale of the loss squared; with
            "graft" that does not matter. Or "true": F = VVᵀ/B from labels drawn from the model, which takes one more
            backward pass: `opt.sample(outputs)` between the forward pass and `loss.backward()`; then
            d = (1/λ)(g − V(VᵀV + λB·I)⁻¹Vᵀg) with λ = α‖VᵀV‖_F. It keeps x and z of every layer until
            `loss.backward()`, and is not for sharded weights (FSDP).
        gram: "layer"; "network", one K and one c for all layers, for which x and z of every layer are kept until
            the backward pass has met the last one (about the memory of all activations and their gradients); a function
            that is called for the first time after the first step has a K of its own in that step; or "global", K by
            layer over the samples of all processes, see `fngd.optim.distributed`.
        accumulate: with several backward passes a step: "separate" (each has coefficients of its own), or "joint"
            (one Gram matrix over the samples of all passes: the direction of the joined batch, if the losses add up to
            the joined batch's: divide means by the number of passes). "joint" keeps x and z of every layer and
            pass, and one more gradient, until the step; see `fngd.natural.solve.accumulation` for the cost.
        adapt_damping: an `fngd.natural.adaptive_damping.AdaptiveDamping`; `alpha` or `damping` is then multiplied by a
            factor
            that follows how well steps are predicted. After `step()`: `if opt.measuring: opt.adapt(loss,
            the same loss computed again)`. Keeps x and z of every layer until the steps that are measured.
        history: R ≥ 1: the Fisher matrix is that of samples of the last R sub-batches, of this batch's and of earlier
            ones', so that a step leaves the span of its own batch's gradients; see `fngd.natural.solve.history`. Keeps
            x and z of these samples, and needs the same shapes in every step. Goes with fisher="empirical",
            accumulate="separate", gram="layer" or "network", and a fixed damping.
        curvature_samples: how many samples of a batch make a sub-batch, the first ones, ≥ 1 (Ren and Goldfarb 2019);
            None: all. Without history=, R is 1.
        curvature_every: steps from one that keeps a sub-batch to the next, ≥ 1.
        kl_clip: κ > 0; the directions of the preconditioned layers are multiplied by
            ν = min(1, √(κ/Σ_l lr²⟨d_l, g_l⟩)) in `step`, with the learning rates of that moment. With several
            backward passes a step, or several processes, an upper bound of the sum is used.
        other, other_options: the rule for parameters that are not preconditioned: "sgd", with the options above, or
            "adamw" with its own lr (1e-3), betas, eps and weight_decay (1e-2), in parameter groups that a
            scheduler sees.
        output_axis: which axis of the model's output counts samples; for fisher="improved" and "true".
        scaler: the GradScaler of the training loop, so that "per_layer", "improved", damping= and kl_clip see
            unscaled gradients; the rest does not depend on it.
        process_group: of gram="global" and kl_clip; default: all processes.
        diagnostics: keep figures for the property `diagnostics`; costs one more weight gradient a layer.
        batch_axis: see `persample.reweight`.
        functions: the projections of `nn.MultiheadAttention` and parameters in products with data (`F.linear`, `x @ w`,
            `torch.addmm`, `torch.einsum`, `F.conv2d`, …) count as layers ("attn.in_proj_weight", "attn.out_proj", …,
            see `explain()` after the first forward pass). With
            other="adamw" only those of attention do, unless parameter groups say otherwise: the rest is not known
            when groups are made. False leaves them the plain gradient, and keeps a model whose own modules have
            matrices in one graph under torch.compile. Not for sharded weights (FSDP), which take the plain gradient.
        foreach: torch's implementation of the first-order rule; None: torch chooses.
        seed: of the labels that `sample` draws; each process adds its rank.

    A parameter group with precondition=False takes the plain gradient.

    Raises:
        ValueError: an argument out of range, or a model that is reweighted already.

    Approximate: the empirical Fisher matrix, block-diagonal by layer. Through BatchNorm in training mode g_b
    is what flows through sample b's rows. A batch of one sample is scaled by α/(1 + α) under "absorb".

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Linear(3, 1)
    >>> opt = NGD(model, lr=0.1)
    >>> model(torch.randn(8, 3)).square().mean().backward()
    >>> opt.step()
    >>> opt.zero_grad()
    """

    _history: History | None = None

    @showing(NaturalSGD.__init__)
    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        history: int | None = None,
        curvature_samples: int | None = None,
        curvature_every: int = 1,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        wanted = history is not None or curvature_samples is not None or curvature_every != 1
        if wanted:
            _check_alone(options)
        super().__init__(model, params, seed=seed, **options)
        if wanted:
            self._history = History(self._method, history or 1, curvature_samples, curvature_every)
            self._policy.history = self._history

    def _own_state(self) -> dict[str, Any]:
        own = super()._own_state()
        return own if self._history is None else {**own, "history": self._history.state_dict()}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        if self._history is not None:
            check_history(state)

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        super()._load_own_state(state)
        if self._history is not None:
            self._history.load_state_dict(state["history"], first_parameter(self.param_groups).device)


ALONE = {"fisher": ("empirical",), "accumulate": ("separate",), "gram": ("layer", "network"), "adapt_damping": (None,)}
"""What else may be asked for with a history."""


def _check_alone(options: Mapping[str, Any]) -> None:
    for name, allowed in ALONE.items():
        if name in options and options[name] not in allowed:
            raise ValueError(
                f"{name}={options[name]!r} does not go with history=, curvature_samples= and curvature_every=, whose "
                f"Fisher matrix is that of samples of several steps; with them it must be one of {list(allowed)}"
            )
