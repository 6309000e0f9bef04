"""Whose row is it? Each row of a node's gradients belongs to a sample: asked of autograd, never of sizes.

For rules and backends of one's own; the submodules are private.
"""

from persample.attribution.owner import Owner
from persample.attribution.probing import locate, probes

__all__ = ["Owner", "locate", "probes"]
