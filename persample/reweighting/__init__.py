"""Weighted sums in training: `loss.backward()` accumulates Σ_b c_b g_b, with factors that a policy chooses.

`persample.reweight` and what it is made of, for optimisers; the submodules are private.
"""

from persample.reweighting.api import BatchAxis, Policy, reweight
from persample.reweighting.batch_axis.folded import Folded
from persample.reweighting.handle import Reweighting
from persample.reweighting.layer_grads import LayerGrads
from persample.reweighting.slices import Part, Parts

__all__ = ["BatchAxis", "Folded", "LayerGrads", "Part", "Parts", "Policy", "Reweighting", "reweight"]
