"""Kinds of blocks with forms of their own: outer products, tables, stacks of slices.

Private: what is here may change from one version to the next.
"""
