"""Reweighting inside a graph that `torch.compile` makes: hooks that it can trace, and one operator a layer.

Private: what is here may change from one version to the next.
"""
