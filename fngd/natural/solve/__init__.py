"""Solving for coefficients: what is asked, from whose Gram matrix, and the directions that follow."""
