"""Natural-gradient optimisers for PyTorch, built on per-sample gradients."""

from fngd.coefficients import smw_coefficients
from fngd.fngd import FNGD
from fngd.kfac import KFAC
from fngd.ngd import NGD
from fngd.skfac import SKFAC

__all__ = ["FNGD", "KFAC", "NGD", "SKFAC", "smw_coefficients"]
