"""HyLo: natural gradient from a few samples of the batch, and which samples these are."""
