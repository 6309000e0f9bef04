"""Whose rows are whose, proven from the graph: by the kinds of its operations, and by the indices that it holds.

Private: what is here may change from one version to the next.
"""
