"""Cases by architecture: language, vision, graphs, sequences, fields, densities."""
