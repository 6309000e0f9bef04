"""What the backends beside `outputs` share: precision, a check of every row, and a model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from persample.blocks import Block
from persample.checks import check_sum
from persample.precision import coarsest
from persample.reductions import weighted_sum

ADVICE = "Use backend='outputs', which covers every operation."


@dataclass(frozen=True)
class Scaled(Block):
    """g_b = weights_b · inner_b; only ever summed, so nothing is copied."""

    inner: Block
    weights: Tensor

    @property
    def batch(self) -> int:
        return self.inner.batch

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.inner.factors


@weighted_sum.register
def _(block: Scaled, c: Tensor) -> Tensor:
    return weighted_sum(block.inner, c * block.weights.to(c))


def distinct_weights(losses: Tensor) -> Tensor:
    """Weights [B] between 1/2 and 3/2, all different and in no simple relation: multiples of the golden ratio."""
    numbers = torch.arange(1, losses.shape[0] + 1, dtype=torch.float64, device=losses.device)
    return (0.5 + (numbers * 0.6180339887498949) % 1).to(losses.dtype)


def check_rows(
    blocks: Mapping[str, Sequence[Block]], losses: Tensor, parameters: Mapping[str, Tensor], backend: str
) -> None:
    """Raises `CheckError` unless Σ_b w_b g_b is the gradient of Σ_b w_b ℓ_b, with weights w_b all different.

    At the price of the plain sum check it sees more: rows that add up and yet are mixed up among the samples.
    """
    if not parameters or not losses.requires_grad:
        return
    weights = distinct_weights(losses)
    gradient = torch.autograd.grad(losses, list(parameters.values()), weights, retain_graph=True, allow_unused=True)
    scaled = {name: [Scaled(block, weights) for block in found] for name, found in blocks.items()}
    check_sum(
        scaled,
        dict(zip(parameters, gradient, strict=True)),
        precision=coarsest(losses, *parameters.values()),
        backend=backend,
    )


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Puts buffers that were written or replaced back to the values they had; the others are not touched.

    The context is a function that names those that changed. Values are compared, because batch normalisation
    writes its statistics without raising their version.
    """
    before = [
        (module, own, f"{path}.{own}".lstrip("."), buffer, buffer.clone())
        for path, module in model.named_modules()
        for own, buffer in module._buffers.items()
        if buffer is not None
    ]

    def changed() -> list[str]:
        return [
            name
            for module, own, name, buffer, value in before
            if module._buffers.get(own) is not buffer or not torch.equal(buffer, value)
        ]

    try:
        yield changed
    finally:
        for module, own, _, buffer, value in before:
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
            module._buffers[own] = buffer
