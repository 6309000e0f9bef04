"""Grouped products: rows of one matrix, group by group, with a matrix for each group (experts).

y_r = x_r W_e(r), rows sorted by group, of which `offs` says where each ends:  g_b^e = Σ_{r of b and e} x_r ⊗ z_r
"""

from __future__ import annotations

from persample.attribution.owner import Owner
from persample.blocks.types import Block, Outer, Stacked
from persample.rules import Site, rule


@rule("GroupedMmBackward0")
def grouped_mm(site: Site) -> Block | None:
    """self [R, I] @ mat2 [E, I, O], samples among the rows."""
    x, ends, owner = site.saved("self"), site.saved("offs"), site.owner
    if site.slot != 1 or ends is None or x.ndim != 2 or len(site.input_shape) != 3 or owner.axis != 0:
        return None
    parts: list[tuple[int, Block]] = []
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            rows = slice(start, end)
            of_group = Owner(0, owner.ids[rows], site.batch)
            parts.append((group, Outer(x=of_group.by_sample(site.z[rows]), z=of_group.by_sample(x[rows]))))
        start = end
    return Stacked(tuple(parts), 0, site.input_shape) if parts else None
