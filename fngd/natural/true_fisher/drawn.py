"""fisher="true": gradients of labels that the model has drawn, kept until the loss's own backward pass needs them.

Symbols: `fngd.natural.solve.directions`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fngd.natural.diagnostics import Solve
from fngd.natural.solve.accumulation import Passes, joined_gradients
from fngd.natural.solve.directions import Pair, curved
from fngd.natural.solve.method import Method
from persample import LayerGrads
from persample.reweighting import Reweighting


class Drawn:
    """What the backward passes of sampled labels have left since the last step, by key as in `Passes`."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._passes = Passes()
        self._samples: dict[str, dict[str, LayerGrads]] = {}

    def clear(self) -> None:
        """Forgets everything: a step was made."""
        self._passes.clear()
        self._samples.clear()

    def keep(self, key: str, batch: int, grads: dict[str, LayerGrads], handle: Reweighting) -> None:
        """Keeps V of one backward pass, or of all so far; while a policy runs."""
        if self._method.accumulate == "joint":
            grads = joined_gradients(self._passes, key, batch, grads, handle)
        self._samples[key] = grads

    def directions(
        self,
        key: str,
        batch: int,
        grads: dict[str, LayerGrads],
        passes: Passes,
        *,
        loss_scale: Tensor | None,
        alpha: float | None,
        damping: float | None,
    ) -> tuple[dict[str, tuple[Pair, Pair]], Solve, dict[str, LayerGrads]]:
        """Returns (d, g) of each layer, what is known of the Gram matrix, and V.

        `passes`: those of the training loss. Raises ValueError where labels were not drawn for the same samples.
        """
        joint = self._method.accumulate == "joint"
        samples = self._samples.get(key, {}) if joint else self._samples.pop(key, {})
        if not set(grads) <= set(samples):
            raise ValueError(
                f"fisher='true' has no gradients of sampled labels for layers {sorted(set(grads) - set(samples))}. "
                "Call opt.sample(outputs) after every forward pass and before its loss.backward(), with the outputs "
                "that the loss is computed from"
            )
        sampled = {path: samples[path] for path in grads}
        ones = {path: torch.ones(each.batch_size, device=each.device) for path, each in grads.items()}
        plain = {path: each.weighted_sum(ones[path]) for path, each in grads.items()}
        sizes = [batch]
        if joint:
            plain = {path: passes.plain(path, pair) for path, pair in plain.items()}
            sizes = passes.sizes.setdefault(key, [])
            sizes.append(batch)
        drawn = self._passes.sizes[key] if joint else [next(iter(sampled.values())).batch_size]
        if drawn != sizes:
            raise ValueError(
                f"the labels that opt.sample drew are for batches of {drawn} samples, but the backward passes had "
                f"{sizes}. Call opt.sample(outputs) once for every forward pass, before its loss.backward()"
            )
        unit = 1.0 if loss_scale is None else 1 / loss_scale  # the sampled losses were scaled, too
        one, *others = (each.gram() for each in sampled.values())
        gram = sum(others, one) * unit**2
        pairs = curved(
            plain, sampled, unit, gram, scale=self._method.solved_scale, alpha=alpha, damping=damping
        )  # fmt: skip
        return pairs, Solve(gram, alpha, damping), sampled
