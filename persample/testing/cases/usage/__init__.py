"""Cases by how a model is used: batches, layouts, couplings, training."""
