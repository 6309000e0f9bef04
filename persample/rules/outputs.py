"""One use of a parameter for several outputs at once: their z lie side by side as channels of one operation.

A product with x [T, I] and z_c [T, O] of C outputs is one with z [T, C·O], and so are a convolution's, and the bias'.
One rule is asked once, in place of C times; the factors of its block are then told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from torch import Tensor

from persample.blocks.types import Block, Conv, Dense, Outer, Outputs
from persample.rules import RULES, Site

CHANNELS = {
    ("AddmmBackward0", 0): 1, ("AddmmBackward0", 2): 1, ("MmBackward0", 1): 1,
    ("ConvolutionBackward0", 1): 1, ("ConvolutionBackward0", 2): 1,
}  # fmt: skip
"""Kind and slot -> the axis of z along which the parameter has entries of its own."""


def build_together(site: Site, many: Tensor) -> tuple[Block, str] | None:
    """Returns the block of all outputs, rows b·C + c, and the rule's name; None where they must be built one by one.

    Args:
        site: of the use; its z is not looked at.
        many: z of each output, [C, *z].
    """
    kind = site.node.name()
    axis, rule, owner = CHANNELS.get((kind, site.slot)), RULES.get(kind), site.owners[0]
    if axis is None or rule is None or owner is None or owner.axis != 0 or prod(many.shape) == 0:
        return None
    convolution = kind == "ConvolutionBackward0"
    if convolution and (site.saved("transposed") or site.saved("groups") > 1 or owner.layout != "identity"):
        return None
    shared = {} if site.read is None else site.read
    wide = shared.get("side by side")
    if wide is None:  # for all slots of the operation
        wide = shared["side by side"] = many.movedim(0, axis).flatten(axis, axis + 1)
    if not convolution and site.slot == 0:
        if site.input_shape != many.shape[2:]:
            return None
        block: Block | None = Dense(owner.sum_by_sample(wide if site.saved("beta") == 1 else wide * site.saved("beta")))
    else:
        block = rule(replace(site, zs=(wide,)))
    together = None if block is None else _apart(block, len(many), site.input_shape)
    return None if together is None else (together, rule.__name__)


def _apart(block: Block, count: int, shape: Sequence[int]) -> Block | None:
    if isinstance(block, Conv):
        return Outputs(block.x, block.z.unflatten(1, (count, -1)), block.spec)
    if isinstance(block, Outer):  # of the right factor of a product: x is z of the operation
        return Outputs(block.z, block.x.unflatten(2, (count, -1)).movedim(2, 1), transposed=True)
    return Dense(block.values.reshape(-1, *shape)) if isinstance(block, Dense) else None
