"""How each gradient is held and formed, for `explain()`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

from persample.blocks.convolution.algorithms import ordinary
from persample.blocks.convolution.choice import choose_form, gram_form
from persample.blocks.convolution.gradients import choose
from persample.blocks.kinds.outer import gram_by_hadamard, norms_by_hadamard
from persample.blocks.types import Block, Conv, Outer, Outputs, Pulled, Rows, Stacked
from persample.result.gradient import Gradient


@dataclass(frozen=True)
class Explanation:
    """How the gradient of one use of a parameter is held and formed.

    Attributes:
        parameter: its name.
        operation: the kind of autograd node, or module, at which it meets the data; "× 7": that many in one block.
        rule: what made the block of it; "generic" is exact and may be slow.
        block: "Outer", "Conv", "Rows", "Dense", "Stacked", "Pulled", of a Jacobian "Outputs"; see
            `persample.blocks.types`.
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


@singledispatch
def algorithm(block: Block) -> str:
    """Returns in words how gradients, norms and Gram matrix of a block are formed."""
    return "rows as they are"


@algorithm.register
def _(block: Outer) -> str:
    norms, gram = norms_by_hadamard(block, block), gram_by_hadamard(block, block)
    words = {True: "Hadamard", False: "rows"}
    return f"grads: {'outer product' if block.x.shape[1] == 1 else 'bmm'}; norms: {words[norms]}; gram: {words[gram]}"


@algorithm.register
def _(block: Conv) -> str:
    if not block.batch:
        return "nothing: a batch of none"
    given = block.x, block.z, block.spec
    norms, gram = choose_form(*ordinary(*given), None), gram_form(*given)
    return f"grads: {choose(*given)}; norms: {norms}; gram: {gram}"


@algorithm.register
def _(block: Rows) -> str:
    gram = "row by row of the table" if block.device.type == "cpu" else "Hadamard over equal indices"
    return f"grads: index_add; norms: Hadamard over equal indices; gram: {gram}"


@algorithm.register
def _(block: Pulled) -> str:
    behind = algorithm(block.inner)
    return f"behind a rearrangement, {behind}" if block.isometric else f"grads pulled back; before that, {behind}"


@algorithm.register
def _(block: Outputs) -> str:
    return f"{block.outputs} outputs of one input, {algorithm(block.one(0))}"


@algorithm.register
def _(block: Stacked) -> str:
    ways = dict.fromkeys(algorithm(part) for _, part in block.parts)
    return f"{len(block.parts)} slices apart, {' or '.join(ways)}"
