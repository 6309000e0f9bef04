"""How each gradient is held and formed, for `explain()`."""

from __future__ import annotations

from dataclasses import dataclass

from persample.blocks.explain import algorithm
from persample.result.gradient import Gradient


@dataclass(frozen=True)
class Explanation:
    """How the gradient of one use of a parameter is held and formed.

    Attributes:
        parameter: its name.
        operation: the kind of autograd node, or module, at which it meets the data; "× 7": that many in one block.
        rule: what made the block of it; "generic" is exact and may be slow.
        block: "Outer", "Conv", "Rows", "Dense" or "Pulled"; see `persample.blocks.types`.
        algorithm: how rows, norms and Gram matrix are formed; "rows as they are" needs no forming.
        nbytes: bytes held by this block.

    >>> psg = persample.per_sample(nn.Linear(3, 2), lambda y, _: y.sum(1), torch.randn(5, 3))
    >>> psg.explain()[1].parameter, psg.explain()[1].block
    ('bias', 'Dense')
    """

    parameter: str
    operation: str
    rule: str
    block: str
    algorithm: str
    nbytes: int


def explained(name: str, gradient: Gradient) -> list[Explanation]:
    """Returns a row for every use of a parameter, or one that says that there is none."""
    if not gradient.uses:
        return [Explanation(name, "unused", "zero", "none", "none", 0)]
    return [
        Explanation(name, use.operation, use.rule, type(use.block).__name__, algorithm(use.block), use.block.nbytes)
        for use in gradient.uses
    ]
