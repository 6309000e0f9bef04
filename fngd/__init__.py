"""Natural-gradient optimisers for PyTorch, built on per-sample gradients."""

from fngd.coefficients import smw_coefficients
from fngd.fngd import FNGD
from fngd.ngd import NGD

__all__ = ["FNGD", "NGD", "smw_coefficients"]
