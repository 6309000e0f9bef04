"""Blocks: the gradients of every sample for one use of a parameter, held in factors, and what is formed of them.

For rules and backends of one's own; the submodules are private.
"""

from persample.blocks.reductions import full_precision, materialise
from persample.blocks.types import Block, Conv, Dense, Outer, Pulled, Rows

__all__ = ["Block", "Conv", "Dense", "Outer", "Pulled", "Rows", "full_precision", "materialise"]
