"""Labels drawn from the model, and their backward pass: what fisher="true" adds to the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fngd.natural.policy import Policy
from fngd.natural.solve.method import Method
from fngd.natural.true_fisher.likelihoods import sampled_losses
from fngd.optim.distributed import world_size
from fngd.optim.layers import parameters
from fngd.optim.state.parts import not_compiled
from persample.reweighting import Reweighting


class Sampling:
    """Part of `NGD`: `sample`."""

    _method: Method
    _policy: Policy
    _handle: Reweighting
    _scaler: Any
    _group: Any
    _seed: int
    _random: torch.Generator | None = None

    @not_compiled
    def sample(
        self, outputs: Tensor, likelihood: str | Callable[[Tensor], Tensor] = "categorical", *,
        class_axis: int | None = None,
    ) -> None:  # fmt: skip
        """Draws labels from the model and back-propagates them, for fisher="true"; `.grad` stays as it is.

        Arguments:
            outputs: what the model returned in this forward pass: logits, or means.
            likelihood: "categorical", "bernoulli", "gaussian" (variance 1), or a function that draws labels for the
                outputs and returns −log p of them, [B]; see `fngd.natural.true_fisher.likelihoods`.
            class_axis: the axis of classes, where outputs have more than two.

        To be called between the forward pass and its `loss.backward()`. With "damping=" or "per_layer" the
        likelihood must be the one whose −log p is a sample's training loss; else its scale does not matter.

        Raises ValueError if the Fisher matrix is not the true one, the outputs have no graph, or for a likelihood
        that `fngd.natural.true_fisher.likelihoods` refuses.

        >>> model = nn.Linear(3, 4)
        >>> opt = fngd.NGD(model, lr=0.1, fisher="true")
        >>> logits = model(torch.randn(8, 3))
        >>> opt.sample(logits)
        >>> nn.functional.cross_entropy(logits, torch.arange(8) % 4).backward()
        >>> opt.step()
        """
        if self._method.fisher != "true":
            raise ValueError(f"sample(outputs) is for fisher='true', but fisher is {self._method.fisher!r}")
        if not isinstance(outputs, Tensor) or not outputs.requires_grad:
            found = "one without a graph" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(f"sample needs the tensor that the model returned with gradients enabled, not {found}")
        members = [param for path in self._handle.layers for param in parameters(self._handle, path)]
        params = list(dict.fromkeys(param for param in members if param.requires_grad))
        if any(hasattr(param, "to_local") for param in params):
            raise ValueError(
                "fisher='true' needs whole weights, but these are sharded (FSDP). Use fisher='empirical' or 'improved'"
            )
        if self._random is None or self._random.device != outputs.device:
            rank = dist.get_rank(self._group) if world_size(self._group) > 1 else 0
            self._random = torch.Generator(outputs.device).manual_seed(self._seed + rank)
        with torch.enable_grad():
            losses = sampled_losses(
                outputs, likelihood, axis=self._method.output_axis, class_axis=class_axis, generator=self._random
            )
            # Not loss_scale(): before the loop has scaled its first loss there is no scale yet.
            total = losses.sum() if self._scaler is None else self._scaler.scale(losses.sum())
            with self._policy.drawing():
                torch.autograd.grad(total, params, retain_graph=True, allow_unused=True)
