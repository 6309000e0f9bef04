"""Misuse that would train silently wrong: a model that was changed, a loss that is reduced in another way."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from operator import is_
from typing import Any

from torch import Tensor, nn

from fngd.optim.groups import first_parameter
from fngd.optim.layers import parameter_of
from persample import Reweighting

_REDUCTIONS = {1: "mean", 2: "sum"}
"""What torch's loss functions keep as `reduction` in their node of the graph."""


class CheckedLoss:
    """Part of the optimisers that are told how the loss is reduced: `check_loss`."""

    _reduction: str

    def check_loss(self, loss: Tensor) -> None:
        """Raises ValueError if the loss was reduced in another way than `reduction` says, where its graph tells.

        `step(closure)` does so by itself where it matters, and `adapt`. See `fngd.optim.guards.reduction_of`.

        >>> model = nn.Linear(3, 1)
        >>> opt = fngd.NGD(model, lr=0.1, reduction="sum")
        >>> opt.check_loss(nn.functional.mse_loss(model(torch.randn(8, 3)), torch.zeros(8, 1)))
        Traceback (most recent call last):
        ...
        ValueError: the training loss is a mean over the batch...
        """
        found = reduction_of(loss)
        if found is not None and found != self._reduction:
            raise ValueError(
                f"the training loss is a {found} over the batch, but the optimiser was constructed with "
                f"reduction={self._reduction!r}. Give it reduction={found!r}, or reduce the loss that way"
            )


class Unchanged:
    """Remembers which parameters a model has, and tells when that is no longer so."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._known = model, _parameters(model)
        self._remember()

    def _remember(self) -> None:
        """Notes what each module holds: to look whether that is still so takes microseconds, to name all does not."""
        modules = list(self._model.modules())
        dicts: list[Any] = [each for module in modules for each in (module._modules, module._parameters)]
        self._held = [(each, list(each.values())) for each in dicts if each]
        self._empty = [each for each in dicts if not each]

    def _as_remembered(self) -> bool:
        for now, before in self._held:
            if len(now) != len(before) or not all(map(is_, now.values(), before)):
                return False
        return not any(map(len, self._empty))

    def look(self, groups: list[dict[str, Any]]) -> None:
        """Calls `check` where a module holds something else than before; not where FSDP swaps parameters."""
        if self._as_remembered() or hasattr(first_parameter(groups), "to_local"):
            return
        self.check()
        self._remember()

    def check(self) -> None:
        """Raises ValueError if parameters were added to, removed from or replaced in the model since."""
        now = _parameters(self._model)
        if now == self._known:
            return
        added, gone = sorted(set(now) - set(self._known)), sorted(set(self._known) - set(now))
        replaced = sorted(name for name in set(now) & set(self._known) if now[name] != self._known[name])
        found = {"added": added, "removed": gone, "replaced": replaced}
        what = ", ".join(f"{names} {verb}" for verb, names in found.items() if names)
        raise ValueError(
            f"the model was changed after the optimiser was constructed: parameters {what}. Call the optimiser's "
            "remove(), and construct a new one when the model is complete"
        )


def _parameters(model: nn.Module) -> dict[str, int]:
    # Tensors themselves would be compared by value; the optimiser keeps them alive, so their ids stay theirs.
    return {name: id(param) for name, param in model.named_parameters(remove_duplicate=False)}


def _entries(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad


def check_probe(path: str, handle: Reweighting, chosen: Callable[[str], bool], model: nn.Module | None) -> None:
    """Raises ValueError where the layer that is to be probed never will be; `model`: if functions are layers, too."""
    known = handle.layers
    if path in known and chosen(path):
        return
    if path in handle.explain():
        raise ValueError(
            f"probe_layer={path!r} takes the plain gradient or is another layer's second name, and would never "
            f"be probed. Choose one of {[each for each in known if chosen(each)]}"
        )
    weight = None if model is None else parameter_of(model, path)
    if weight is None or weight.dim() != 2:
        raise ValueError(
            f"probe_layer={path!r} is no layer of the model. Its layers are {list(known)}; a weight that a "
            "function uses goes by its name"
        )


def warn_of_more_passes(layer: str, passes: int, index: int) -> None:
    """Warns that a step makes more backward passes than when its coefficients were computed, which were `passes`."""
    warnings.warn(
        f"backward pass {passes + 1} of step {index + 1} of the epoch has no stored coefficients at layer '{layer}': "
        f"that step had {passes} when they were computed. They are computed now. If a pass was for another "
        "model's loss (a GAN's generator step), clear its gradients by the model's zero_grad(), or "
        "freeze the model for it by requires_grad_(False): else coefficients meet other passes. After a step that was "
        "skipped, call the optimiser's zero_grad()",
        stacklevel=2,
    )


def warn_of_same_samples(layer: str, passes: int) -> None:
    """Warns that a backward pass has no sample ids of its own; `passes`: those of the step that went before."""
    warnings.warn(
        f"backward pass {passes + 1} of a step has no sample ids of its own at layer '{layer}': it is taken for one of "
        "the samples that next_batch announced last. With several backward passes a step call "
        "opt.next_batch(sample_ids) before each of them",
        stacklevel=2,
    )


def warn_of_skipped(groups: list[dict[str, Any]]) -> bool:
    """Warns that a batch has ended without a step, unless its gradients say why; returns whether it has."""
    grads = [param.grad for group in groups for param in group["params"] if param.grad is not None]
    if any(hasattr(grad, "to_local") or not bool(_entries(grad).isfinite().all()) for grad in grads):
        return False
    warnings.warn(
        "zero_grad() of the optimiser follows a backward pass without step(): it counts as a batch that was skipped, "
        "and the next one has the next batch's coefficients. If the pass belongs to no batch (another model's loss "
        "went through this one, as a GAN's generator's does), clear its gradients by the model's zero_grad() instead, "
        "or freeze the model for it by requires_grad_(False)",
        stacklevel=4,
    )
    return True


def reduction_of(loss: Tensor) -> str | None:
    """Returns "mean" or "sum" where a loss's graph tells how it was reduced, else None.

    It looks at the last operation only: one of torch's losses, `.mean()` or `.sum()`. Of a loss that was multiplied or
    divided afterwards, or that has further terms, nothing is known.

    >>> import torch
    >>> reduction_of(nn.functional.mse_loss(torch.zeros(3, requires_grad=True), torch.ones(3)))
    'mean'
    """
    return node_reduction(loss.grad_fn)


def node_reduction(node: Any) -> str | None:
    """Returns the same of a loss's node."""
    if node is None:
        return None
    if node.name() in ("MeanBackward0", "SumBackward0"):
        return "mean" if node.name() == "MeanBackward0" else "sum"
    return _REDUCTIONS.get(getattr(node, "_saved_reduction", 0))
