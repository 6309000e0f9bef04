"""The gradient of every sample in a batch, for any PyTorch model."""
