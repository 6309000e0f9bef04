"""Labels drawn from a model's own distribution, for the true Fisher matrix.

F = E[∇log p(y|x) ∇log p(y|x)ᵀ] with y drawn from p(·|x), the distribution that the model's outputs stand for
(Martens 2014; Kunstner, Hennig, Balles 2019 on why labels of the data give another matrix).

likelihood       outputs are                    −log p(y|x), up to a constant       goes with
"categorical"    logits over `class_axis`       cross-entropy                       F.cross_entropy
"bernoulli"      logits, one per event          binary cross-entropy                F.binary_cross_entropy_with_logits
"gaussian"       means, variance 1              ½‖y − outputs‖²                     ½ F.mse_loss(..., reduction="sum")

The label of a sample is everything that its outputs stand for: the log-probabilities of its positions add up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def sampled_losses(
    outputs: Tensor,
    likelihood: str | Callable[[Tensor], Tensor] = "categorical",
    *,
    axis: int = 0,
    class_axis: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " batch"]:
    """Returns −log p(y_b|x_b) for labels y_b drawn from the model, one number per sample.

    Arguments:
        outputs: what the model returned, with a graph; samples on `axis`.
        likelihood: a name from the table above, or a function of the outputs that draws labels and returns [B].
        class_axis: where a categorical distribution has its classes; needed for outputs of more than two axes.
        generator: of the draws, on the device of the outputs.

    Raises ValueError for an unknown likelihood, a class axis that is needed or wrong, or a function that returns
    something other than one number per sample. Nothing waits for the device; NaN in the outputs gives NaN.

    >>> logits = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    >>> sampled_losses(logits).abs()  # the model is sure of its labels
    tensor([0., 0.])
    """
    if callable(likelihood):
        losses = likelihood(outputs)
        if losses.shape != (outputs.shape[axis],):
            raise ValueError(
                f"the likelihood returned shape {list(losses.shape)}; it must be one −log p per sample, "
                f"[{outputs.shape[axis]}], as the outputs have shape {list(outputs.shape)} with samples on axis {axis}"
            )
        return losses
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood={likelihood!r} is unknown; choose one of {list(LIKELIHOODS)}, or give a function")
    if class_axis is not None and likelihood != "categorical":
        raise ValueError(f"class_axis={class_axis} is for likelihood='categorical', not {likelihood!r}")
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if likelihood == "categorical":
        classes = _class_axis(outputs, axis, class_axis)
        outputs, axis = outputs.movedim(classes, -1), axis if classes > axis else axis - 1
    losses = LIKELIHOODS[likelihood](outputs, generator)
    return losses.movedim(axis, 0).flatten(1).sum(1) if losses.dim() > 1 else losses


def _class_axis(outputs: Tensor, axis: int, class_axis: int | None) -> int:
    dims = outputs.dim()
    if class_axis is None:
        if dims != 2:
            raise ValueError(
                f"outputs of shape {list(outputs.shape)} have several axes that could count classes; give class_axis= "
                "(1 for F.cross_entropy's [B, classes, ...], -1 for [B, positions, classes])"
            )
        return 1 - axis
    if not -dims <= class_axis < dims or class_axis % dims == axis:
        raise ValueError(
            f"class_axis={class_axis} is no axis of classes in outputs of shape {list(outputs.shape)} with samples "
            f"on axis {axis}"
        )
    return class_axis % dims


def _categorical(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    # The Gumbel trick: unlike torch.multinomial it neither raises nor waits where a logit is NaN.
    waiting = torch.empty_like(logits).exponential_(generator=generator)
    labels = (logits.detach() - waiting.log()).argmax(-1, keepdim=True)
    return -logits.log_softmax(-1).gather(-1, labels).squeeze(-1)


def _bernoulli(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    uniform = torch.empty_like(logits).uniform_(generator=generator)
    labels = (uniform < logits.detach().sigmoid()).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def _gaussian(means: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.empty_like(means).normal_(generator=generator)
    return 0.5 * (means.detach() + noise - means).square()


LIKELIHOODS: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {
    "categorical": _categorical,
    "bernoulli": _bernoulli,
    "gaussian": _gaussian,
}
