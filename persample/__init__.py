"""The gradient of every sample in a batch, for any PyTorch model: exactly, fast, never silently wrong."""

from persample.api import backends, grad, per_sample
from persample.errors import CheckError, CoupledSamplesError, PerSampleError, UnsupportedError
from persample.result import Explanation, PerSampleGrads

__all__ = [
    "CheckError",
    "CoupledSamplesError",
    "Explanation",
    "PerSampleError",
    "PerSampleGrads",
    "UnsupportedError",
    "backends",
    "grad",
    "per_sample",
]
