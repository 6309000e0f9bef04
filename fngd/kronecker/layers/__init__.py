"""Which layers are preconditioned, and their gradients as matrices."""
