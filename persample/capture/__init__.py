"""Capturing a batch: from the graph of its losses to the blocks of every parameter, and the checks of them.

Private: what is here may change from one version to the next.
"""
