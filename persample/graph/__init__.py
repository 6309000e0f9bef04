"""The autograd graph: its nodes, what they saved, what they derive from, and passes through it.

Private: what is here may change from one version to the next.
"""
