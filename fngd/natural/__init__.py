"""NGD and FNGD: coefficients from a Gram matrix, computed in the backward pass or shared across epochs.

Private: what is here may change from one version to the next.
"""
