"""Which rows of a layer belong to which sample: proven from the graph, declared, or tried out on the model.

Private: what is here may change from one version to the next.
"""
