"""Natural-gradient optimisers for PyTorch, built on per-sample gradients."""

from fngd.adaptive import AdaptiveDamping
from fngd.coefficients import smw_coefficients
from fngd.eva import Eva
from fngd.fngd import FNGD
from fngd.gauss_newton import GaussNewton
from fngd.kfac import KFAC
from fngd.ngd import NGD
from fngd.shampoo import Shampoo
from fngd.skfac import SKFAC

__all__ = ["FNGD", "KFAC", "NGD", "SKFAC", "AdaptiveDamping", "Eva", "GaussNewton", "Shampoo", "smw_coefficients"]
