"""From sites to blocks: what is captured of a parameter, whatever pass z came from.

use (node, slot, route) ─▶ site ─▶ rule ─▶ block at the node ─▶ pulled back along the route ─▶ uses merged
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from persample.attribution.coupling import not_finite_error
from persample.attribution.uses import Use
from persample.blocks.kinds.stacked import join_dense, join_outer, stacked
from persample.blocks.types import Block, Dense, Outer, Outputs, Pulled, Stacked
from persample.capture.types import Captured
from persample.graph.routes import Route
from persample.graph.saved import saved_by


def capture_use(use: Use, block: Block, rule: str) -> Captured:
    """One use of a parameter, from the block at the node that uses it."""
    return Captured(pulled(block, use.route), use.node.name().replace("Backward0", ""), rule)


def pulled(block: Block, path: Route) -> Block:
    """The block behind the operations between the parameter and its use."""
    if not path.nodes:
        return block
    if path.names in (["TBackward0"], ["TransposeBackward0"]) and isinstance(block, Outer):
        return block.transposed
    if path.names in (["TBackward0"], ["TransposeBackward0"]) and isinstance(block, Outputs) and block.spec is None:
        return block.turned
    shape = tuple(path.leaf.variable.shape)
    part = _slice(block, path)
    if part is not None:
        return part
    pull = path.pull if path.watched or path.isometric else partial(_pulled_apart, path)
    if isinstance(block, Dense):
        return Dense(pull(block.values))
    return Pulled(block, pull, shape, path.isometric)


def _slice(block: Block, path: Route) -> Stacked | None:
    """The block of a use of one slice of the parameter; None where it is of no slice."""
    cut, rest = path.cut, path.names[:-1]
    if cut is None:
        return None
    if rest in (["TBackward0"], ["TransposeBackward0"]) and isinstance(block, Outer):
        block, rest = block.transposed, []
    if rest in (["TBackward0"], ["TransposeBackward0"]) and isinstance(block, Outputs) and block.spec is None:
        block, rest = block.turned, []
    return None if rest else Stacked(((cut.place, block),), cut.dim, tuple(path.leaf.variable.shape))


def _pulled_apart(path: Route, rows: Tensor) -> Tensor:
    """The rows, pulled; refused where an operation on the way may have made one sample's NaN that of all."""
    arrived = path.pull(rows)
    if not bool(arrived.sum().isfinite()):
        before, after = (each.reshape(len(each), -1).isfinite().all(1) for each in (rows, arrived))
        if bool((before & ~after).any()):
            raise not_finite_error(f"a parameter of shape {tuple(path.leaf.variable.shape)}")
    return arrived


def saved_on_the_way(block: Block) -> list[Tensor]:
    """The tensors that operations between the parameter and its use read again when rows are pulled back."""
    path = getattr(block.pull, "__self__", None) if isinstance(block, Pulled) and not block.isometric else None
    return saved_by(path.nodes) if isinstance(path, Route) else []


def merged(uses: list[Captured]) -> tuple[Captured, ...]:
    """Uses with the same kind of block made one: a recurrent weight, a module called twice."""
    if len(uses) == 1:
        return (uses[0],)
    joined: list[Captured] = []
    outer = [use.block for use in uses if isinstance(use.block, Outer)]
    dense = [use.block for use in uses if isinstance(use.block, Dense)]
    slices = [use.block for use in uses if isinstance(use.block, Stacked)]
    together = stacked(slices) if len(slices) > 1 else None
    for kind, block in ((Outer, join_outer(outer)), (Dense, join_dense(dense)), (Stacked, together)):
        same = [use for use in uses if isinstance(use.block, kind)]
        if block is not None:
            joined.append(Captured(block, f"{same[0].operation} × {len(same)}", same[0].rule))
            uses = [use for use in uses if not isinstance(use.block, kind)]
    return *joined, *uses
