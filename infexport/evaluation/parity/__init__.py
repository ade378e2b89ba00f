"""Parity: a bundle computes what PyTorch computes."""
