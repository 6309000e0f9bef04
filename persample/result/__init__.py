"""Results of `persample.per_sample`: gradients, norms, Gram matrices and sums, formed when they are asked for.

Private: what is here may change from one version to the next.
"""
