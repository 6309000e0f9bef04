"""Which algorithm a block's reductions will use, in words: for `PerSampleGrads.explain`."""

from __future__ import annotations

from functools import singledispatch

from persample.blocks.convolution.algorithms import ordinary
from persample.blocks.convolution.choice import choose_form, gram_form
from persample.blocks.convolution.gradients import choose
from persample.blocks.outer import gram_by_hadamard, norms_by_hadamard
from persample.blocks.types import Block, Conv, Outer, Pulled, Rows, Stacked


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
def _(block: Stacked) -> str:
    ways = dict.fromkeys(algorithm(part) for _, part in block.parts)
    return f"{len(block.parts)} slices apart, {' or '.join(ways)}"
