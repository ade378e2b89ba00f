"""Correctness and speed of a bundle: parity, accuracy, centrality, benchmark and report."""
