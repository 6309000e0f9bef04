"""What the backends beside `outputs` share: precision, a check of every row, and a model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from persample.blocks.types import Block
from persample.capture.sum_check import SumCheck, distinct_weights
from persample.graph.nodes import precision_within

ADVICE = "Use backend='outputs', which covers every operation."


def check_rows(
    blocks: Mapping[str, Sequence[Block]], losses: Tensor, parameters: Mapping[str, Tensor], backend: str
) -> None:
    """Raises `CheckError` unless Σ_b w_b g_b is the gradient of Σ_b w_b ℓ_b, with weights w_b all different.

    At the price of the plain sum check it sees more: rows that add up and yet are mixed up among the samples.
    """
    if not parameters:
        return
    weights = distinct_weights(losses)
    gradient = torch.autograd.grad(losses, list(parameters.values()), weights, retain_graph=True, allow_unused=True)
    sums = SumCheck(weights, dict(zip(parameters, gradient, strict=True)))
    for name, found in blocks.items():
        sums.add(name, found)
    sums.compare(precision=precision_within(losses), backend=backend)


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
