"""States of optimisers: what they hold, what they must look like, and copies of their owners.

Private: what is here may change from one version to the next.
"""
