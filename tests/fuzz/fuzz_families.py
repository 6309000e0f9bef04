"""The registry of families of pieces of models, and what their makers use; see `fuzz_models`."""

from __future__ import annotations

import torch
from torch import nn

FAMILIES = {1: {}, 2: {}, 3: {}, 4: {}}  # dimensions beside the batch's -> name -> function


def family(rank):
    """Registers `make(r, shape) -> (module, shape of its output)` for inputs [B, *shape] of `rank` dimensions."""

    def register(make):
        FAMILIES[rank][make.__name__] = make
        return make

    return register


class Fn(nn.Module):
    """A forward function with the parameters and modules that it uses."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, x):
        return self.function(self, x)


def weights(*shape, scale=0.5):
    """A random tensor for a parameter."""
    return scale * torch.randn(shape)


def same(shape, forward, **parts):
    """A piece whose output has the shape of its input."""
    return Fn(forward, **parts), shape
