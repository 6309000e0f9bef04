"""Coefficients that are computed in one epoch and reused in later ones.

Private: what is here may change from one version to the next.
"""
