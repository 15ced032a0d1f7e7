"""Sparse autoencoders: mathematics, activations, training, formats, measurements."""

import os

# Read when torch is loaded. Threads that wait by spinning take the cores from everybody else's:
# of two programs on two cores each ran more than ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
