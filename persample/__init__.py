"""The gradient of every sample in a batch, for any PyTorch model: exactly, fast, never silently wrong."""

from typing import TYPE_CHECKING

from persample.testing.start import VERSION, check_torch, deferred

__version__ = VERSION

if TYPE_CHECKING or not deferred(__name__):
    check_torch()
    from persample.blocks.kernels import force_kernel
    from persample.errors import CheckError, CoupledSamplesError, PerSampleError, UnsupportedError
    from persample.result.api import backends, from_losses, grad, per_sample
    from persample.result.explanation import Explanation
    from persample.result.jacobian import Jacobian, jacobian
    from persample.result.per_sample_grads import PerSampleGrads
    from persample.reweighting.api import Reweighting, reweight
    from persample.reweighting.batch_axis.folded import Folded
    from persample.reweighting.layer_grads import LayerGrads

__all__ = [
    "CheckError",
    "CoupledSamplesError",
    "Explanation",
    "Folded",
    "Jacobian",
    "LayerGrads",
    "PerSampleError",
    "PerSampleGrads",
    "Reweighting",
    "UnsupportedError",
    "backends",
    "force_kernel",
    "from_losses",
    "grad",
    "jacobian",
    "per_sample",
    "reweight",
]
