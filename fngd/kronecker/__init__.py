"""KFAC, SKFAC and Eva: a layer's Fisher matrix as a Kronecker product.

Private: what is here may change from one version to the next.
"""
