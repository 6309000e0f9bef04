"""How a result is held: in factors, in chunks of the batch, or as autograd's graph; and what was changed meanwhile.

Private: what is here may change from one version to the next.
"""
