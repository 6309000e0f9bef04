"""Weights that a function is given, where no module's call tells: attention, linear functions, convolutions.

Private: what is here may change from one version to the next.
"""
