"""`python -m fngd demo`, the first minute: who is right, what it costs, what it is good for."""
