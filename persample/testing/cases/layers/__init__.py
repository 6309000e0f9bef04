"""Cases by layer: every kind of module, attention, weights that are computed."""
