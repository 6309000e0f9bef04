"""Operations entry by entry: the node's own backward, before the sum over broadcast dimensions, is per entry."""

from __future__ import annotations

from torch import Tensor

from persample.blocks.types import Block, Dense
from persample.graph.calls import call_node, sum_to, without_call
from persample.rules import Site, rule


def summed(site: Site, entries: Tensor) -> Block | None:
    """The block whose rows sum `entries`, of z's shape, over one sample and over broadcast dimensions.

    None where the input spans the samples' axis: its own entries then belong to samples.
    """
    axis, shape = site.owner.axis, site.input_shape
    if axis is None:
        return None
    aligned = axis - (entries.ndim - len(shape))  # the input's dimension that meets the samples' axis
    if aligned >= 0 and shape[aligned] != 1:
        return None
    # [B, T, *others] -> [B, ..., T, ...]: z's dimensions again, the samples' axis holding positions alone
    rows = site.owner.by_sample(entries)
    return Dense(sum_to(rows.movedim(1, axis + 1) if axis else rows, (site.batch, *shape)))


@rule(
    "AddBackward0", "SubBackward0", "RsubBackward0", "MulBackward0", "DivBackward0", "PowBackward1",
    "WhereBackward0", "MaximumBackward0", "MinimumBackward0", "AddcmulBackward0", "AddcdivBackward0",
    "LerpBackward0", "LerpBackward1", "Atan2Backward0", "PreluKernelBackward0",
)  # fmt: skip
def elementwise(site: Site) -> Block | None:
    """Any operation that treats every entry by itself, after broadcasting."""
    entries = without_call(site.node, site.z, site.slot, site.saved)
    if entries is None:
        entries = call_node(site.node, [site.z])[site.slot]
    return None if entries is None or entries.shape != site.z.shape else summed(site, entries)


@rule("ExpandBackward0")
def expand(site: Site) -> Block | None:
    """A parameter repeated by broadcasting (class tokens); the node itself would sum over samples."""
    return summed(site, site.z)
