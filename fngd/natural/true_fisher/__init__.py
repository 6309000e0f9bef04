"""fisher="true": labels drawn from the model in place of those of the batch.

Private: what is here may change from one version to the next.
"""
