"""Random projections of per-sample gradients, for `PerSampleGrads.project`; the submodules are private."""

from persample.projections.families import SJLT, Kronecker, Mask, Projection, Rademacher

__all__ = ["SJLT", "Kronecker", "Mask", "Projection", "Rademacher"]
