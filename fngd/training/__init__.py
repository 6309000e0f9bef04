"""Training loops that compare optimisers: data, models, settings and the commands.

Public: the names below. The submodules are private.
"""

from typing import TYPE_CHECKING

from fngd.training.settings import Config
from persample.testing.start import deferred

if TYPE_CHECKING or not deferred(__name__):
    from fngd.training.data import Dataset, Split, load
    from fngd.training.loop import Comparison
    from fngd.training.recipes import OPTIMIZERS, SCHEDULES, OptimizerSpec, build_optimizer

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Comparison",
    "Config",
    "Dataset",
    "OptimizerSpec",
    "Split",
    "build_optimizer",
    "load",
]
