"""Convolutions: weight gradients of every sample, by the algorithm and form that is cheapest for a geometry.

Private: what is here may change from one version to the next.
"""
