"""Natural-gradient optimisers for PyTorch, built on per-sample gradients; part of the distribution `persample`."""

from typing import TYPE_CHECKING

from persample.testing.start import VERSION, deferred

__version__ = VERSION

if TYPE_CHECKING or not deferred(__name__):
    from fngd.coefficients import smw_coefficients
    from fngd.data_influence import influence
    from fngd.kronecker.ekfac import EKFAC
    from fngd.kronecker.eva import Eva
    from fngd.kronecker.hylo.hylo import HyLo
    from fngd.kronecker.kfac import KFAC
    from fngd.kronecker.mbf import MBF
    from fngd.kronecker.skfac import SKFAC
    from fngd.least_squares.gauss_newton import GaussNewton
    from fngd.natural.adaptive_damping import AdaptiveDamping
    from fngd.natural.fngd import FNGD
    from fngd.natural.ngd import NGD
    from fngd.shampoo import Shampoo

__all__ = [
    "EKFAC",
    "FNGD",
    "KFAC",
    "MBF",
    "NGD",
    "SKFAC",
    "AdaptiveDamping",
    "Eva",
    "GaussNewton",
    "HyLo",
    "Shampoo",
    "influence",
    "smw_coefficients",
]
