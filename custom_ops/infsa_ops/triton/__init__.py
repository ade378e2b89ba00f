"""Triton kernel of the affinity operators, for GPUs."""
