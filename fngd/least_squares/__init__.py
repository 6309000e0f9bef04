"""Gauss–Newton for residuals: one linear solve in whichever space is cheaper, and a step that is tried.

The submodules are private.
"""

from fngd.least_squares.gauss_newton import GaussNewton
from fngd.least_squares.reweighing import CausalWeights, GroupBalance, ResidualAttention
from fngd.least_squares.systems import SketchOptions

__all__ = ["CausalWeights", "GaussNewton", "GroupBalance", "ResidualAttention", "SketchOptions"]
