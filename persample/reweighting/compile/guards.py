"""Graphs of torch.compile are told apart by hooks.

torch.compile takes two modules of one class, one with hooks and one without, for the same, and gives the second the
graph of the first: a reweighted model would train with the plain gradient, because a plain one of its kind was
compiled earlier.
"""

from __future__ import annotations

import torch
import torch._dynamo


def compare_hooks() -> None:
    """Has torch.compile compare hooks from now on, in the whole process; graphs made without are made again."""
    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()
