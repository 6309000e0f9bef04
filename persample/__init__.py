"""The gradient of every sample in a batch, for any PyTorch model: exactly, fast, never silently wrong."""

from persample.api import backends, grad, per_sample
from persample.errors import CheckError, CoupledSamplesError, PerSampleError, UnsupportedError
from persample.explanation import Explanation
from persample.folded import Folded
from persample.kernels import force_kernel
from persample.layers import LayerGrads
from persample.result import PerSampleGrads
from persample.reweight import Reweighting, reweight

__all__ = [
    "CheckError",
    "CoupledSamplesError",
    "Explanation",
    "Folded",
    "LayerGrads",
    "PerSampleError",
    "PerSampleGrads",
    "Reweighting",
    "UnsupportedError",
    "backends",
    "force_kernel",
    "grad",
    "per_sample",
    "reweight",
]
